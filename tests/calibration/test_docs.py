"""docs/guide/calibrate.md tells the settings as they are."""

from pathlib import Path

from calibration.settings.table import settings_table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "guide" / "calibrate.md"


def test_the_table_of_settings_is_the_one_that_the_recipe_makes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    first = "| setting |"
    assert text.count(first) == 1
    table = text[text.index(first) :].split("\n\n", 1)[0]
    assert table == settings_table(), "python -m calibration.settings.table prints what belongs into the document"
