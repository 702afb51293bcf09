"""The recipes and the README of examples/: read by the real reader, planned on published layouts."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibration.blocks.memory_need import planned_need
from calibration.model.architectures import find_architecture
from calibration.model.plan import decoder_names, plan
from calibration.model.source import Source
from calibration.output.export import checkpoint_size
from calibration.settings.recipe import Recipe, read_recipe
from tests.examples.running import EXAMPLES
from tests.published_layouts import layout

README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


# By the beginning of a recipe's name; of Qwen3-Omni, the thinker's decoder.
LAYOUTS = {"qwen2.5-omni-7b": "7B", "qwen3-omni-30b-a3b": "30B-A3B"}


def least_gib(name: str, recipe: Recipe) -> float:
    """GiB that a calibration of the layout takes at least."""
    config, tensors = layout(name)
    architecture = find_architecture(config)
    spec, names = plan(architecture, config, tensors, recipe), decoder_names(architecture, config, tensors)
    return planned_need(architecture, tensors, names, spec, recipe).least / 2**30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_readme_tells_a_recipes_needs(path: Path) -> None:
    name, recipe = LAYOUTS[path.stem.rpartition("-")[0]], read_recipe(path)
    memory = least_gib(name, recipe)
    device = {"cpu": "CPU", "cuda": "one GPU"}[recipe.device]
    row = f"{device} | {memory:.1f} GiB | {recipe.max_samples} | {recipe.max_tokens} |"
    assert f"| `examples/recipes/{path.name}` | {row}" in README
    config, tensors = layout(name)
    spec = plan(find_architecture(config), config, tensors, recipe)
    size = checkpoint_size(Source(Path(), config, tensors), spec)
    before = sum(tensor.nbytes for tensor in tensors.values())
    assert f"{before / 1e9:.1f} GB of weights, the checkpoint {size / 1e9:.1f} GB" in README


def test_the_guide_tells_the_memory_of_each_effort() -> None:
    def gib(**settings: Any) -> str:
        return f"{least_gib('7B', Recipe(**settings)):.0f} GiB"

    guide = " ".join((EXAMPLES.parent / "docs" / "guide" / "calibrate.md").read_text(encoding="utf-8").split())
    efforts = [f"{gib(effort=effort)} with `{effort}`" for effort in ("fast", "default", "best")]
    assert f"A 7B layout needs {efforts[0]}, {efforts[1]} and {efforts[2]}" in guide
    assert f"`--sample-tokens 32768` brings `default` to {gib(sample_tokens=32768)}." in guide


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_line_of_a_recipe_states_a_setting_that_matters(path: Path) -> None:
    """Its device and dtype, which a reader looks for, or a value that is not the default."""
    default, stated = Recipe(), yaml.safe_load(path.read_text(encoding="utf-8"))
    idle = [name for name, value in stated.items() if getattr(default, name) == value]
    assert set(idle) <= {"device", "dtype"}


def test_the_readme_shows_every_script_with_options_that_it_has() -> None:
    assert len(SCRIPTS) == 5 and len(RECIPES) == 3
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        commands = re.findall(rf"python examples/{path.name}(.*)", f"{README}\n{source}")
        assert len(commands) >= 2, f"a command of {path.name} stands in its docstring and in the README"
        used = {word for command in commands for word in shlex.split(command.strip("|")) if word.startswith("--")}
        known = set(re.findall(r'add_argument\("(--[\w-]+)"', source))
        assert used <= known, path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_copied(path: Path) -> None:
    """It imports nothing of benchmarks, of tests or of its neighbours."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert names
    assert not {name.partition(".")[0] for name in names} & {"benchmarks", "tests", "examples", ""}
