"""The parts of the GPU evidence: that each could be started, and which a command chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.calibrate.__main__ as calibrate
import benchmarks.demo.__main__ as demo
import benchmarks.gpu_experts.__main__ as gpu_experts
import benchmarks.gpu_linear.__main__ as gpu_linear
import benchmarks.serve.__main__ as serve
from benchmarks.gpu.parts import NAMES, PARTS, Part, chosen
from benchmarks.gpu.run import command_of
from calibration.settings.recipe import read_recipe

PARSERS = {
    "benchmarks.calibrate": calibrate.parser,
    "benchmarks.demo": demo.parser,
    "benchmarks.gpu_experts": gpu_experts.parser,
    "benchmarks.gpu_linear": gpu_linear.parser,
    "benchmarks.serve": serve.parser,
}


@pytest.mark.parametrize("part", PARTS, ids=NAMES)
def test_the_command_of_a_part_is_one_that_its_program_takes(part: Part, tmp_path: Path) -> None:
    _, _, module, *arguments = command_of(part, tmp_path)
    if module == "pytest":
        folder = Path(arguments[arguments.index("-m") + 2])
        files = folder.glob("test_*.py") if folder.is_dir() else [folder]
        assert any("pytest.mark.gpu" in path.read_text() for path in files)
        assert f"--junitxml={tmp_path}/{part.result}" in arguments
    else:
        taken = PARSERS[module]().parse_args(arguments)
        written = taken.result.parent if module == "benchmarks.demo" else taken.results
        assert written == tmp_path
        if module == "benchmarks.calibrate":
            recipe = read_recipe(overrides=calibrate.settings(taken.set))
            assert (recipe.device, recipe.dtype) == ("cuda", "bfloat16")


def test_parts_have_names_of_their_own() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_the_quick_command_runs_some_parts_the_full_one_all_and_names_choose() -> None:
    assert [part.name for part in chosen([], False)] == ["kernels", "linears", "engine", "serve"]
    assert chosen([], True) == list(PARTS)
    assert [part.name for part in chosen(["serve", "kernels"], False)] == ["kernels", "serve"]
