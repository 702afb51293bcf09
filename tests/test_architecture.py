"""Which way imports point, for the whole tree, and that packages list the modules that they have.

Read from the source, imports inside functions and of types included: no module is run.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("morphoquant_vllm", "calibration")

# What each room of morphoquant_vllm may import: other rooms, and libraries. Only a command is above plugin and hf.
ROOMS = {
    "": set(),
    "errors": set(),
    "environment": set(),
    "compat": set(),  # vLLM by name, while it compares
    "private_parts": set(),
    "handles": {"torch"},
    "host_memory": {"torch"},
    "numerics": {"errors", "torch", "safetensors"},
    "format": {"errors", "numerics", "torch", "safetensors"},
    "cpu": {"environment", "errors", "host_memory", "numerics", "torch"},
    "gpu": {"environment", "errors", "numerics", "torch", "triton", "typer"},
    "backends": {"cpu", "errors", "gpu", "handles", "numerics", "torch"},
    "ops": {"backends", "handles", "numerics", "torch"},
    "hf": {"backends", "environment", "errors", "format", "numerics", "torch", "transformers"},
    # vLLM in other processes only.
    "doctor": {"cpu", "environment", "errors", "format", "gpu", "torch"},
    "plugin": {
        *("", "backends", "compat", "environment", "errors", "format", "handles", "host_memory", "numerics", "ops"),
        # vLLM brings the last three.
        *("torch", "transformers", "vllm", "huggingface_hub", "prometheus_client", "tqdm"),
    },
    "names": {"errors", "format", "plugin"},
}
# Kernels are reached by backends alone.
ROOMS_OF_CALIBRATION = {
    "",
    "backends",
    "doctor",
    "environment",
    "errors",
    "format",
    "hf",
    "host_memory",
    "numerics",
}
NOT_IN_CALIBRATION = {"vllm", "triton", "benchmarks", "tests"}
# These commands run with pyproject.toml's dependencies without extras. A package is imported by its name but this one.
IMPORTED_AS = {"pyyaml": "yaml"}
COMMANDS_WITHOUT_EXTRAS = (
    *("calibration.cli", "calibration.output.inspection", "calibration.output.convert"),
    "morphoquant_vllm.numerics.golden",
)

LISTED = re.compile(r"^ *([a-z]\w+(?:, [a-z]\w+)*) {2,}\S", re.MULTILINE)
FEW_MODULES = 3


@dataclass(frozen=True)
class Arrow:
    """One import: `name` is None if a whole module is imported."""

    source: str
    target: str
    name: str | None
    runs_at_import: bool

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}" + (f":{self.name}" if self.name else "")


def module_files() -> dict[str, Path]:
    """Files of both packages, by the names of their modules."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = module_files()


def arrows_of(source: str, path: Path, tree: ast.Module) -> Iterator[Arrow]:
    at_import = {id(node) for node in statements_that_run(tree.body)}
    package = source if path.name == "__init__.py" else source.rpartition(".")[0]
    for node in ast.walk(tree):
        runs = id(node) in at_import
        if isinstance(node, ast.Import):
            yield from (Arrow(source, alias.name, None, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield Arrow(source, *((whole, None) if whole in MODULES else (module, alias.name)), runs)


def statements_that_run(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; not those for a type checker alone."""
    for node in body:
        yield node
        if isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from statements_that_run([*node.body, *handlers, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from statements_that_run(node.body)
        elif isinstance(node, ast.If):
            checked = "TYPE_CHECKING" in ast.unparse(node.test)
            yield from statements_that_run(node.orelse if checked else [*node.body, *node.orelse])


ARROWS = [
    arrow
    for source, path in MODULES.items()
    for arrow in arrows_of(source, path, ast.parse(path.read_text(encoding="utf-8")))
    if arrow.target.partition(".")[0] not in sys.stdlib_module_names
]


def room_of(module: str) -> str:
    """Room of a module of morphoquant_vllm, "" of the package itself; of others the library's name."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "morphoquant_vllm" else first


def refuse(arrows: list[Arrow]) -> None:
    assert not arrows, "\n".join(["", *sorted({str(arrow) for arrow in arrows})])


def of(package: str) -> list[Arrow]:
    return [arrow for arrow in ARROWS if arrow.source.partition(".")[0] == package]


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_source_was_read() -> None:
    assert len(MODULES) > 100 and len(ARROWS) > 500
    assert {room_of(module) for module in MODULES if is_below(module, "morphoquant_vllm")} == set(ROOMS)
    assert any(arrow.target == "morphoquant_vllm.gpu.launch" and not arrow.runs_at_import for arrow in ARROWS)


def test_a_room_imports_what_it_may() -> None:
    wrong = [
        arrow
        for arrow in of("morphoquant_vllm")
        if room_of(arrow.target) not in ROOMS[room_of(arrow.source)] | {room_of(arrow.source)}
    ]
    refuse(wrong)


def test_calibration_reaches_neither_kernels_nor_the_plugin() -> None:
    wrong = [
        arrow
        for arrow in of("calibration")
        if (is_below(arrow.target, "morphoquant_vllm") and room_of(arrow.target) not in ROOMS_OF_CALIBRATION)
        or arrow.target.partition(".")[0] in NOT_IN_CALIBRATION
    ]
    refuse(wrong)


def test_nothing_that_serves_imports_the_gpu_tools() -> None:
    tools = "morphoquant_vllm.gpu.tools"
    wrong = [arrow for arrow in ARROWS if is_below(arrow.target, tools) and not is_below(arrow.source, tools)]
    refuse(wrong)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for arrow in ARROWS:
        if arrow.runs_at_import and arrow.target in MODULES:
            graph[arrow.source].add(arrow.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("command", COMMANDS_WITHOUT_EXTRAS)
def test_what_needs_no_extra_imports_none(command: str) -> None:
    """Down to the last module that is imported with it."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.match(r"[\w-]+", line).group() for line in needed]
    installed = {IMPORTED_AS.get(name, name) for name in names}
    reached, waiting, wrong = set(), [command], []
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        for arrow in (arrow for arrow in ARROWS if arrow.source == module and arrow.runs_at_import):
            if arrow.target in MODULES:
                # Python runs every package on the way.
                parts = arrow.target.split(".")
                waiting += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            elif arrow.target.partition(".")[0] not in installed:
                wrong.append(arrow)
    refuse(wrong)


def packages() -> list[Path]:
    inner = [path.parent for path in MODULES.values() if path.name == "__init__.py"]
    return [*inner, ROOT / "benchmarks" / "common", ROOT / "benchmarks" / "models"]


@pytest.mark.parametrize("folder", packages(), ids=lambda folder: ".".join(folder.relative_to(ROOT).parts))
def test_a_package_lists_the_modules_that_it_has(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = [name for names in LISTED.findall(docstring) for name in names.split(", ")]
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    public = {name for name in modules if not name.startswith("_")}
    if listed or len(public) > FEW_MODULES:
        assert sorted(listed) == sorted(public)
