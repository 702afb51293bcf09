"""The mask's threshold for a whole network, and the recipe that it goes into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import job as jobs
from benchmarks.accuracy.methods import METHODS, OBJECTIVE, Served
from benchmarks.accuracy.serving import objective
from benchmarks.accuracy.settings import Settings
from calibration.settings.recipe import read_recipe
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{number}" for number in range(400)))
    return path


def job_of(model: Path, text: Path, work: Path) -> jobs.Job:
    never: Callable[..., Any] = lambda *arguments: pytest.fail("evaluated")  # noqa: E731
    settings = Settings(work=work, window_tokens=32)
    return jobs.Job("language", settings, model, [text], 3, {"code": "0"}, never, never, ("code",), ("code",))


def test_the_threshold_lies_tau_deviations_above_the_mean_of_all_inputs() -> None:
    seen = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    assert objective.network_threshold(seen, 2.0) == pytest.approx(3 + 2 * 2.5**0.5)


def test_inputs_without_a_threshold_are_left_out_and_so_is_each_first_token(llama: Path, text: Path) -> None:
    found = objective.input_dispersions(llama, [text], 32, 3, "down_proj")
    # Two blocks; attention, o_proj and gate/up of each.
    assert [len(each) for each in found] == [128, 128, 128] * 2
    assert len(objective.input_dispersions(llama, [text], 32, 3, "o_proj")) == 6
    # Two tokens a window: of one token minimum and maximum are the same.
    assert all(float(each.max()) == 0 for each in objective.input_dispersions(llama, [text], 2, 1, "down_proj"))


def test_the_recipe_waits_for_the_threshold_and_holds_it_then(llama: Path, text: Path, tmp_path: Path) -> None:
    job, method = job_of(llama, text, tmp_path / "work"), METHODS["served-network-mask"]
    assert isinstance(method, Served) and method.network_tau is not None
    assert jobs.recipe_of(job, method) is None and jobs.load(job, "served-network-mask", "code") is None
    jobs._make_threshold(job, method.network_tau)
    recipe = jobs.recipe_of(job, method)
    assert recipe is not None
    seen = objective.input_dispersions(llama, [text], 32, 3, "down_proj")
    assert recipe["dispersion_threshold"] == objective.network_threshold(seen, method.network_tau)


@pytest.mark.parametrize("name", OBJECTIVE)
def test_recipes_of_the_objective_are_read_and_differ_from_the_default(name: str) -> None:
    method = METHODS[name]
    assert isinstance(method, Served)
    assert read_recipe(overrides=method.recipe).grid == "reference"
