"""From flags to the recipe's values."""

import pytest

from calibration.settings.flags import chosen
from calibration.settings.recipe import Recipe


def test_only_flags_that_are_given_override_the_recipe() -> None:
    settings = dict.fromkeys(Recipe.model_fields) | {
        "targets": [],
        "ignore": ["a", "b"],
        "regression": False,
        "seed": 0,
    }
    assert chosen(settings) == {"ignore": ["a", "b"], "regression": False, "seed": 0}


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("4", 4), ("-1", "-1")])
def test_a_number_is_told_from_a_word(text: str, value: object) -> None:
    assert chosen({"tensor_parallel": text, "device": "0"}) == {"tensor_parallel": value, "device": "0"}
