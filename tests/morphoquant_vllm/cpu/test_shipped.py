"""The kernels that a wheel brings: they belong to the sources, are undamaged, and share torch's threads."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu import shipped
from morphoquant_vllm.cpu.compiler import BuildError
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries
from tests.morphoquant_vllm.cpu.cases import compare_shape
from tests.morphoquant_vllm.cpu.libraries import old_compiler

# The names that build.load asks for, and a function that needs an OpenMP library.
SOURCE = """
#include <cstdint>
extern "C" int omp_get_max_threads();
extern "C" {
int morphoquant_act_quant(const char*) { return omp_get_max_threads() > 0 ? 42 : 0; }
int morphoquant_linear(const char*) { return 0; }
int morphoquant_head(const char*) { return 0; }
int morphoquant_experts(const char*) { return 0; }
int morphoquant_head_bfloat16(const char*) { return 0; }
int64_t morphoquant_request_size() { return 7; }
int morphoquant_has_head_bfloat16() { return 0; }
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sources, and the folder of their libraries."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("prebuilt")
    (sources / "entry.cpp").write_text(SOURCE)
    shipped.compile_all(folder, cpu_libraries.compiler(), sources)
    return sources, folder


@pytest.fixture
def fresh() -> Iterator[None]:
    cpu_build.kernels.cache_clear()
    yield
    cpu_build.kernels.cache_clear()


def test_each_instruction_set_has_a_library(built: tuple[Path, Path]) -> None:
    sources, folder = built
    for instructions in cpu_build.INSTRUCTION_SETS:
        assert shipped.find(instructions, folder, sources) == folder / f"cpu-{instructions}.so"


def test_an_old_compiler_leaves_newer_instructions_out(built: tuple[Path, Path], tmp_path: Path) -> None:
    sources, _ = built
    shipped.compile_all(tmp_path / "old", [old_compiler(tmp_path)], sources)
    found = {name: shipped.find(name, tmp_path / "old", sources) is not None for name in cpu_build.INSTRUCTION_SETS}
    assert found == {"avx512_vnni": False, "avx_vnni": False, "avx2": True}
    with pytest.raises(BuildError, match="failed"):
        shipped.compile_all(tmp_path / "none", ["false"], sources)


def test_a_library_of_other_sources_is_not_loaded(built: tuple[Path, Path], tmp_path: Path) -> None:
    sources, folder = built
    shutil.copytree(sources, tmp_path / "changed")
    (tmp_path / "changed" / "entry.cpp").write_text(SOURCE + "// newer\n")
    assert shipped.find("avx2", folder, tmp_path / "changed") is None


@pytest.mark.parametrize("damage", ["cut", "no manifest", "not JSON", "a list"])
def test_a_damaged_package_has_no_prebuilt_kernels(built: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    sources, folder = built
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    library, manifest = copy / "cpu-avx2.so", copy / shipped.MANIFEST
    if damage == "cut":
        library.write_bytes(library.read_bytes()[:-100])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text({"not JSON": "{", "a list": "[]"}[damage])
    assert shipped.find("avx2", copy, sources) is None


def test_it_is_linked_to_no_openmp_and_finds_torchs(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = built[1]
    monkeypatch.setattr(shipped, "find", lambda instructions, place: folder / "cpu-avx2.so")
    assert b"libgomp" not in (folder / "cpu-avx2.so").read_bytes()
    kernels = shipped.load("avx2", folder)
    assert kernels is not None and kernels.act_quant(b"") == 42 and kernels.request_size == 7
    monkeypatch.setattr(cpu_build, "torch_openmp", lambda: None)
    assert shipped.load("avx2", folder) is None
    monkeypatch.setattr(cpu_build, "torch_openmp", lambda: tmp_path / "no-such-library.so")
    assert shipped.load("avx2", folder) is None, "it is compiled instead"


def test_prebuilt_kernels_need_no_compiler(
    fresh: None, monkeypatch: pytest.MonkeyPatch, built: tuple[Path, Path], tmp_path: Path
) -> None:
    library = cpu_build.load(built[1] / "cpu-avx2.so", "avx2") if cpu_build.torch_openmp() else None
    monkeypatch.setattr(shipped, "load", lambda instructions: library)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / "cache"))
    assert cpu_build.kernels() is library and library is not None
    assert not (tmp_path / "cache").exists()


def test_flags_of_the_wheels_builder_do_not_change_the_arithmetic_of_a_process(tmp_path: Path) -> None:
    sources, folder = tmp_path / "sources", tmp_path / "prebuilt"
    sources.mkdir()
    (sources / "entry.cpp").write_text('extern "C" int answer() { return 42; }\n')
    shipped.compile_all(folder, [*cpu_libraries.compiler(), "-ffast-math"], sources)
    built = shipped.find("avx2", folder, sources)
    code = f"import ctypes; small = 1e-320; ctypes.CDLL({str(built)!r}); assert small * 0.5 > 0"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.full
@pytest.mark.parametrize("instructions", sorted(cpu_build.INSTRUCTION_SETS))
def test_the_real_kernels_compute_as_the_reference(tmp_path_factory: pytest.TempPathFactory, instructions: str) -> None:
    cpu_libraries.native(instructions)  # skips if the processor cannot run them
    folder = tmp_path_factory.getbasetemp() / "shipped-kernels"
    if not folder.exists():
        shipped.compile_all(folder, cpu_libraries.compiler())
    kernels = shipped.load(instructions, folder)
    assert kernels is not None and kernels.instructions == instructions
    for shape in ((70, 640, 64), (33, 1056, 32)):
        compare_shape(*shape, kernels)
