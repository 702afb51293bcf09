from pathlib import Path
from typing import Any

import pytest

from calibration.settings.recipe import Recipe, read_recipe, rounds_jointly, shares_budget
from morphoquant_vllm.errors import MorphoQuantError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_design() -> None:
    recipe = read_recipe()
    assert recipe == Recipe()
    assert (recipe.group_size, recipe.tau, recipe.lam, recipe.lower, recipe.lp_norm) == (32, 2.0, 0.8, 0.6, 2.0)
    assert recipe.full_mask == ("*.down_proj",)
    assert recipe.tensor_parallel == "auto"
    assert recipe.shard_size == 4_000_000_000


def test_every_setting_is_documented() -> None:
    assert [name for name, field in Recipe.model_fields.items() if not field.description] == []


def test_flags_override_the_file_and_none_overrides_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "group_size: 64\ntau: 1.5\ntargets: '*.q_proj'\nshard_size: 1MB\n")
    recipe = read_recipe(path, {"tau": 1.0, "group_size": None})
    assert (recipe.group_size, recipe.tau, recipe.targets, recipe.shard_size) == (64, 1.0, ("*.q_proj",), 1_000_000)


def test_effort_fast_draws_fewer_tokens_unless_told_otherwise() -> None:
    drawn = {effort: read_recipe(overrides={"effort": effort}).sample_tokens for effort in ("fast", "default", "best")}
    assert drawn == {"fast": 16384, "default": 65536, "best": 65536}
    assert read_recipe(overrides={"effort": "fast", "sample_tokens": 64}).sample_tokens == 64


def test_an_empty_recipe_means_the_defaults(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path / "r.yaml", "# nothing\n")) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("groupsize: 64", "unknown setting 'groupsize'; known: .*group_size"),
        ("group_size: 48", "group_size = 48 is not allowed"),
        ("escape_budget: 0.3", "escape_budget = 0.3 is not allowed"),
        ("escape_budget: -0.01", "escape_budget = -0.01 is not allowed"),
        ("scale_levels: 17", "scale_levels = 17 is not allowed: .*less than or equal to 16"),
        ("grid: best", "grid = 'best' is not allowed"),
        ("effort: [best]", "effort = .* is not allowed"),
        ("rounding: up", "rounding = 'up' is not allowed"),
        ("shrinkage: 0", "shrinkage = 0 is not allowed"),
        ("massive_row: 3", "massive_row = 3 is not allowed"),
        ("tau: -1", "tau = -1 is not allowed"),
        ("tau: .nan", "tau = nan is not allowed"),
        ("tau: .inf", "tau = inf is not allowed"),
        ("dispersion_threshold: .inf", "dispersion_threshold = inf is not allowed"),
        ("seed: 18446744073709551616", "seed = 18446744073709551616 is not allowed"),
        ("decoder: 2024-02-30", "is not YAML"),
        ("seed: 0x_", "is not YAML"),
        ("lam: 0", "lam = 0 is not allowed"),
        ("lower: 1.0", "lower = 1.0 is not allowed"),
        ("modality_balance: 2", "modality_balance = 2 is not allowed"),
        ("tensor_parallel: 0", "tensor_parallel = 0 is not allowed"),
        ("tensor_parallel: many", "tensor_parallel = 'many' is not allowed"),
        ("dtype: int8", "dtype = 'int8' is not allowed"),
        ("shard_size: large", "shard_size = 'large' is not allowed"),
        ("shard_size: 0", "shard_size = 0 is not allowed"),
        ("targets: []", "targets = .* is not allowed"),
        ("- a\n- b", "not a mapping"),
        ("escape_budget: 0.01\nseed: 1\nescape_budget: 0.04", "escape_budget is set 2 times; leave one of the lines"),
        ("a: [", "is not YAML"),
        ("a: " + 100_000 * "[", "is not YAML"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(MorphoQuantError, match=expected) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="the recipe cannot be read"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "learns", "shares"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"budget": "model"}, False, True),
        ({"budget": "equal"}, True, False),
        ({"grid": "reference"}, True, False),
        ({"escape_budget": 0.0}, True, False),
        ({"budget": "equal", "bits_budget": 4.6}, False, True),
    ],
)
def test_whether_inputs_share_a_budget(settings: dict[str, Any], learns: bool, shares: bool) -> None:
    assert shares_budget(Recipe(**settings), learns=learns) == shares


def test_errors_of_outputs_cancel_where_steps_and_scales_learn() -> None:
    assert rounds_jointly(Recipe(budget="equal"), learns=True)
    assert not rounds_jointly(Recipe(), learns=False)
    assert not rounds_jointly(Recipe(rounding="nearest"), learns=True)
