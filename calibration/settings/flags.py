"""The flags of `calibrate` that override settings of the recipe, made from the recipe's fields."""

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
    signature = inspect.signature(command, eval_str=True)
    named = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [_parameter(name, field) for name, field in Recipe.model_fields.items()]
    command.__signature__ = signature.replace(parameters=[*named, *flags])  # type: ignore[attr-defined]
    return command


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides for `read_recipe`: typer's values of the flags that were given."""
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    return {name: _number_or_word(Recipe.model_fields[name], value) for name, value in given.items()}


def flag_of(name: str, field: FieldInfo) -> str:
    """The spelling of a setting's flag; a switch has both spellings, in typer's form."""
    flag = next((item.name for item in field.metadata if isinstance(item, Flag)), f"--{name.replace('_', '-')}")
    return f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag


def default_text(field: FieldInfo) -> str:
    """The text of a default in help and documentation."""
    default = field.default
    if default is None or default in ((), ""):
        return "none"
    if isinstance(default, tuple):
        return ", ".join(default)
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default / 10**9:g}GB" if isinstance(default, ByteSize) else str(default)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A parameter of the command. Its default is None: the recipe file, or else the recipe's default, then applies."""
    many = "May be repeated. " if _takes_many(field) else ""
    text = f"{field.description} {many}(default: {default_text(field)})"
    option = typer.Option(None, flag_of(name, field), help=text, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=_text_type(field) | None)


def _text_type(field: FieldInfo) -> Any:
    """The type to which typer converts a flag's text. The recipe checks ranges and words, as for a file."""
    if _takes_many(field):
        return list[str]
    return {bool: bool, int: int, float: float}.get(type(field.default), str)


def _takes_many(field: FieldInfo) -> bool:
    return any(get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation)))


def _number_or_word(field: FieldInfo, value: Any) -> Any:
    """Convert digits to a number if the setting takes both numbers and words."""
    both = int in get_args(field.annotation)
    return int(value) if both and value.isdecimal() else value
