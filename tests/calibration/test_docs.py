"""docs/reference/ tells settings, commands and options as they are."""

import re
from pathlib import Path

import pytest
import typer

from calibration.cli import app
from calibration.settings.recipe import Recipe
from calibration.settings.table import settings_table

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_table_of_settings_is_the_one_that_the_recipe_makes() -> None:
    text = (REFERENCE / "recipe.md").read_text(encoding="utf-8")
    first = "| setting | flag |"
    assert text.count(first) == 1
    table = text[text.index(first) :].split("\n\n", 1)[0]
    assert table == settings_table(), "python -m calibration.settings.table prints what belongs into the document"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_the_command_line_has_each_option_but_settings(command: str) -> None:
    text = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    assert f"| `morphoquant {command} " in text
    section = text.partition(f"## `morphoquant {command}`\n")[2].partition("\n## ")[0]
    options = [item for item in COMMANDS[command].params if item.param_type_name == "option"]
    # A calibration's settings have a page of their own.
    elsewhere = {"help", *(Recipe.model_fields if command == "calibrate" else ())}
    names = [item.opts[0] for item in options if item.name not in elsewhere]
    assert re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE) == names
