"""docs/calibration.md tells the settings as they are."""

import re
from pathlib import Path

from calibration.recipe import Recipe

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "calibration.md"


def test_every_setting_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    expected = {}
    for name, field in Recipe.model_fields.items():
        default = field.default
        if isinstance(default, tuple):
            default = ", ".join(default) or None
        expected[name] = "none" if default is None else str(default)
    assert rows == expected
