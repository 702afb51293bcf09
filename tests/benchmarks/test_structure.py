"""The structure of benchmarks: imports, sizes of folders, and tracked results."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
SHARED = {"common", "models"}
PACKAGES = sorted(path.parent.name for path in BENCHMARKS.glob("*/__init__.py"))
# A folder's own modules, `__init__` and `__main__` apart.
MOST_MODULES = 8
MOST_LINES = 200


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, as `benchmarks.package.module`; those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def strangers(path: Path, package: str) -> set[str]:
    """Benchmark packages that a file of `package` imports and that are neither its own nor shared."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("benchmarks.")}
    return found - SHARED - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_benchmark_imports_no_other(package: str) -> None:
    modules = list((BENCHMARKS / package).rglob("*.py"))
    assert modules
    assert {str(path): found for path in modules if (found := strangers(path, package))} == {}


def test_an_import_of_another_benchmark_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "from benchmarks import serve\nfrom benchmarks.common import files\n"
        "from benchmarks.demo.perplexity import windows\n"
        "def f():\n    import benchmarks.accuracy.kept.cache\n"
    )
    assert strangers(module, "demo") == {"serve", "accuracy"}


def test_only_tests_import_the_main_module_of_a_benchmark() -> None:
    folders = ("benchmarks", "calibration", "morphoquant_vllm")
    for path in (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        taken = [name for name in imported(path) if name.startswith("benchmarks.") and ".__main__" in name]
        assert not taken, f"{path} imports {taken}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_has_few_modules_and_all_its_modules_are_importable(package: str) -> None:
    for folder in {path.parent for path in (BENCHMARKS / package).rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), f"{folder} is not a package"
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= MOST_MODULES, f"{folder} has {len(modules)} modules: sort them into folders by purpose"


def test_the_docstring_of_benchmarks_lists_its_packages() -> None:
    described = ast.get_docstring(ast.parse((BENCHMARKS / "__init__.py").read_text()))
    assert described is not None
    listed = [line.split()[0] for line in described.splitlines()[1:] if line]
    assert sorted(listed) == sorted([*PACKAGES, "results"])


def test_tracked_results_are_json_short_summaries_and_pictures_that_docs_show() -> None:
    done = subprocess.run(["git", "ls-files", "benchmarks/results"], cwd=REPOSITORY, capture_output=True, text=True)
    tracked = [REPOSITORY / line for line in done.stdout.splitlines()]
    pages = "".join(path.read_text() for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
    for path in tracked:
        assert path.suffix in (".json", ".md", ".png"), path
        if path.suffix == ".md":
            assert len(path.read_text().splitlines()) <= MOST_LINES, f"{path}: let a command generate it"
            assert path.with_suffix(".json").is_file(), f"{path} has no JSON beside it"
        if path.suffix == ".png":
            assert str(path.relative_to(REPOSITORY)) in pages, f"{path}: no page shows it"
