"""The kernels that a machine gets: instruction set, OpenMP, and one warning if there are none."""

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from morphoquant_vllm import backends
from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu import cache, shipped
from morphoquant_vllm.cpu.build import INSTRUCTION_SETS
from morphoquant_vllm.cpu.compiler import BuildError
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries


@pytest.fixture
def fresh() -> Iterator[None]:
    """The cache of kernels() is cleared before and after."""
    cpu_build.kernels.cache_clear()
    yield
    cpu_build.kernels.cache_clear()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages of the module's logger, wherever vLLM sends them."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    cpu_build.logger.addHandler(handler)
    yield messages
    cpu_build.logger.removeHandler(handler)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories in which kernels() requests a build; none is made."""
    directories: list[Path] = []

    def build(instructions: str, compiler: list[str], directory: Path, openmp: Path | None) -> Path:
        directories.append(directory)
        raise BuildError("not today")

    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: frozenset(INSTRUCTION_SETS["avx2"][0]))
    monkeypatch.setattr(cpu_build, "build", build)
    return directories


def test_a_directory_of_others_is_not_used(
    tmp_path: Path, asked: list[Path], monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(cache.logger, "warning", lambda text, *of: warnings.append(text % of))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(shared))
    assert cpu_build.kernels() is None and cpu_build.kernels() is None
    (private,) = asked
    assert private.parent != shared and not private.exists(), "it is gone when the library is loaded"
    assert len(warnings) == 1 and "others may write there" in warnings[0] and "MORPHOQUANT_CACHE" in warnings[0]
    shared.chmod(0o755)
    cpu_build.kernels.cache_clear()
    assert cpu_build.kernels() is None
    assert asked[1:] == [shared]


def test_a_library_that_does_not_load_is_built_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """A cache may be shared by systems that differ in more than the compiler."""
    tried: list[Path] = []
    library = tmp_path / "library.so"

    def build(*arguments: object) -> Path:
        library.write_text("")
        return library

    def load(path: Path, instructions: str) -> object:
        tried.append(path)
        if len(tried) == 1:
            raise BuildError("wrong libc")
        assert path.read_text() == ""
        return "kernels"

    monkeypatch.setattr(cpu_build, "build", build)
    monkeypatch.setattr(cpu_build, "load", load)
    assert cpu_build._build_and_load("avx2", ["g++"], tmp_path) == "kernels"
    assert tried == [library, library]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("CXX", "g++ '", "CXX is not a command"), ("MORPHOQUANT_CACHE", "", "no home directory")],
)
def test_an_environment_that_leads_nowhere_is_one_warning(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch, warnings: list[str], fresh: None
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: frozenset(INSTRUCTION_SETS["avx2"][0]))
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, value)
    assert cpu_build.kernels() is None
    assert len(warnings) == 1 and expected in warnings[0] and "\n" not in warnings[0]


@pytest.mark.parametrize("missing", ["no-such-compiler", "", "false"])
def test_without_a_compiler_one_warning_and_the_reference(
    missing: str, monkeypatch, tmp_path: Path, warnings: list[str], fresh: None
) -> None:
    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: frozenset(INSTRUCTION_SETS["avx2"][0]))
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", missing)
    if not missing:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert backends.select_backend(torch.device("cpu")) == "reference"
    assert backends.select_backend(torch.device("cpu")) == "reference"
    assert len(warnings) == 1
    assert "slow torch reference" in warnings[0] and "g++" in warnings[0]


def test_with_an_old_compiler_avx2_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], fresh: None
) -> None:
    cpu_libraries.native("avx2")
    monkeypatch.setenv("CXX", cpu_libraries.old_compiler(tmp_path))
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "load", lambda instructions: None)
    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: frozenset((*INSTRUCTION_SETS["avx2"][0], "avx_vnni")))
    found = cpu_build.kernels()
    assert found is not None and found.instructions == "avx2"
    (warning,) = [message for message in warnings if "serves" in message]
    assert "no kernels for avx_vnni, so avx2 serves: " in warning
    assert "unrecognized option; g++ 11 or newer is known to work" in warning


def test_where_they_build_the_kernels_serve(warnings: list[str], fresh: None) -> None:
    cpu_libraries.native("avx2")
    assert backends.select_backend(torch.device("cpu")) == "cpu"
    assert backends.select_backend(torch.device("meta")) == "reference"
    assert warnings == []


@pytest.mark.parametrize(
    ("flags", "choice", "expected"),
    [
        ("avx2 fma f16c", "", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx_vnni", "", "avx512_vnni"),
        ("avx2 fma f16c avx_vnni", "", "avx_vnni"),
        ("avx2 fma f16c avx_vnni", "avx2", "avx2"),
        # A part of AVX512 does not serve.
        ("avx2 fma f16c avx512f avx512_vnni", "", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni", "avx512_vnni", "avx512_vnni"),
    ],
)
def test_an_instruction_set_is_chosen(tmp_path: Path, flags: str, choice: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse2\nflags\t\t: other\n")
    assert cpu_build.instruction_sets(cpu_build.cpu_flags(tmp_path / "cpuinfo"), choice)[0] == expected


@pytest.mark.parametrize("choice", ["avx512_vnni", "neon"])
def test_an_instruction_set_that_is_not_there_is_refused(choice: str) -> None:
    with pytest.raises(BuildError, match=rf"MORPHOQUANT_CPU={choice}: not .* it has \['avx2'\]"):
        cpu_build.instruction_sets(frozenset(("avx2", "fma", "f16c")), choice)


def test_an_old_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx\n")
    for path in (tmp_path / "cpuinfo", tmp_path / "none"):
        with pytest.raises(BuildError, match="need AVX2, FMA and F16C, which this processor lacks"):
            cpu_build.instruction_sets(cpu_build.cpu_flags(path))


def test_torchs_own_openmp_is_found_among_others(tmp_path: Path) -> None:
    site = Path(torch.__file__).parent
    lines = [
        "7f00-7f01 r-xp 0 00:00 1 /site/scikit_learn.libs/libgomp-e985bcbb.so.1.0.0",
        "7f00-7f01 r-xp 0 00:00 1 /usr/lib/x86_64-linux-gnu/libgomp.so.1",
        f"7f00-7f01 r-xp 0 00:00 1 {site}/lib/libgomp.so.1",
    ]
    maps = tmp_path / "maps"
    for count, expected in ((3, site / "lib/libgomp.so.1"), (2, Path("/usr/lib/x86_64-linux-gnu/libgomp.so.1"))):
        maps.write_text("\n".join(lines[:count]) + "\n")
        assert cpu_build.torch_openmp(maps) == expected
    maps.write_text(lines[0] + "\n")
    assert cpu_build.torch_openmp(maps) is None


def test_the_kernels_share_torchs_threads() -> None:
    """One OpenMP library in the process: the one torch loaded, whose threads vLLM binds."""
    cpu_libraries.native("avx2")
    maps = Path("/proc/self/maps").read_text()
    mapped = {line.split()[-1] for line in maps.splitlines() if "/libgomp" in line and ".libs/" not in line}
    assert mapped == {str(cpu_build.torch_openmp())}


@pytest.mark.parametrize("instructions", sorted(INSTRUCTION_SETS))
def test_every_instruction_set_compiles_to_its_instructions(instructions: str) -> None:
    """Compiled whether or not this machine can run it; the dot product is the one that the set is named for."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump: apt-get install binutils")
    built = cpu_build.build(
        instructions, cpu_libraries.compiler(), cpu_build.cache_directory(), cpu_build.torch_openmp()
    )
    listing = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    dots = [line for line in listing.splitlines() if "vpdpbusd" in line or "vpmaddubsw" in line]
    opcode, register = {
        "avx2": ("vpmaddubsw", "%ymm"),
        "avx_vnni": ("{vex} vpdpbusd", "%ymm"),
        "avx512_vnni": ("vpdpbusd", "%zmm"),
    }[instructions]
    # Every size of tile has its own.
    assert len(dots) > 50
    assert all(opcode in line and register in line for line in dots), dots[:3]
    assert ("%zmm" in listing) == (instructions == "avx512_vnni")
    # The head's code, which is called if the processor supports it.
    assert ("vdpbf16ps" in listing) == (instructions == "avx512_vnni")
