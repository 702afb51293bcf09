"""Environment variables: read in one place, as the documentation says, and when they are asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from morphoquant_vllm import environment

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "reference" / "environment.md"
# Besides environment.py: what torchrun sets for the processes of a calibration.
READERS = {"morphoquant_vllm/environment.py", "calibration/processes.py"}
TORCHRUN = {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def reads(path: Path) -> list[ast.AST]:
    """Places of a file that name os.environ or os.getenv, however they were imported."""
    names = {"environ", "environb", "getenv", "getenvb"}
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.alias) and node.name in names)
    ]


def test_no_other_file_reads_the_environment() -> None:
    files = [path for package in ("morphoquant_vllm", "calibration") for path in (REPOSITORY / package).rglob("*.py")]
    assert {str(path.relative_to(REPOSITORY)) for path in files if reads(path)} == READERS


def test_processes_read_only_what_torchrun_sets() -> None:
    path = REPOSITORY / "calibration" / "processes.py"
    keys = [
        node.slice.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "environ"
    ]
    assert set(keys) == TORCHRUN
    assert len(keys) == len(reads(path))  # there is no other way of reading


def test_the_documentation_has_the_table_of_the_module() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index("| variable |") :].split("\n\n", 1)[0]
    assert table == environment.table(), "python -m morphoquant_vllm.environment prints what belongs into the document"
    assert all(f"`{name}`" in text for name in TORCHRUN)


def test_every_declared_variable_is_in_the_table() -> None:
    declared = [value for value in vars(environment).values() if isinstance(value, environment.Variable)]
    assert declared == list(environment.VARIABLES)


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys; before = set(sys.modules); import morphoquant_vllm.environment; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    others = {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert others == {"morphoquant_vllm"}


@pytest.mark.parametrize("text", [None, ""])
def test_what_is_not_set_or_empty_leaves_the_default(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for variable in environment.VARIABLES:
        if text is None:
            monkeypatch.delenv(variable.name, raising=False)
        else:
            monkeypatch.setenv(variable.name, text)
    assert environment.cpu_instructions() == ""
    assert environment.cache_directory() == Path("/home/someone/.cache/morphoquant")
    assert environment.compiler() == []
    assert environment.tile_table() is None
    assert not environment.fusion()


def test_what_is_set_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORPHOQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert environment.cache_directory() == Path("/caches/morphoquant")
    monkeypatch.setenv("MORPHOQUANT_CACHE", "/mine")
    assert environment.cache_directory() == Path("/mine")
    monkeypatch.setenv("MORPHOQUANT_CPU", "avx2")
    assert environment.cpu_instructions() == "avx2"
    monkeypatch.setenv("CXX", "ccache 'g++ 13'")
    assert environment.compiler() == ["ccache", "g++ 13"]
    monkeypatch.setenv("MORPHOQUANT_TILES", "mine.json")
    assert environment.tile_table() == Path("mine.json")
    for text, wanted in (("1", True), ("0", False)):
        monkeypatch.setenv("MORPHOQUANT_FUSION", text)
        assert environment.fusion() is wanted


def test_the_user_chooses_how_openmp_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment.wait_passively()
    assert environment.WAIT_POLICY.text() == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    environment.wait_passively()
    assert environment.WAIT_POLICY.text() == "PASSIVE"
