"""The flags of `calibrate` that override settings of the recipe, made of the recipe's fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from calibration.settings.recipe import Flag, Recipe


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command, which takes `**settings`, an option for every setting of the recipe."""
    own = inspect.signature(command, eval_str=True)
    named = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [_parameter(name, field) for name, field in Recipe.model_fields.items()]
    command.__signature__ = own.replace(parameters=[*named, *flags])  # type: ignore[attr-defined]
    return command


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_recipe` takes of the values that typer found: those of flags that were given."""
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    return {name: _number_or_word(Recipe.model_fields[name], value) for name, value in given.items()}


def flag_of(name: str, field: FieldInfo) -> str:
    """How a setting's flag is written; that of a switch has both spellings, as typer takes them."""
    flag = next((item.name for item in field.metadata if isinstance(item, Flag)), f"--{name.replace('_', '-')}")
    return f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag


def default_text(field: FieldInfo) -> str:
    """A default as help and documentation show it."""
    default = field.default
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return ", ".join(default)
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default / 10**9:g}GB" if isinstance(default, ByteSize) else str(default)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A parameter of the command; its default is None, so that the recipe's file and then its defaults hold."""
    many = "May be repeated. " if _takes_many(field) else ""
    text = f"{field.description} {many}(default: {default_text(field)})"
    option = typer.Option(None, flag_of(name, field), help=text, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=_text_type(field) | None)


def _text_type(field: FieldInfo) -> Any:
    """What typer makes of a flag's text. Ranges and words are left to the recipe, which refuses them as a file's."""
    if _takes_many(field):
        return list[str]
    return {bool: bool, int: int, float: float}.get(type(field.default), str)


def _takes_many(field: FieldInfo) -> bool:
    return any(get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation)))


def _number_or_word(field: FieldInfo, value: Any) -> Any:
    """Digits are a number where the setting takes both numbers and words."""
    both = int in get_args(field.annotation)
    return int(value) if both and value.isdecimal() else value
