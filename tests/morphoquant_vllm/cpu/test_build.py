"""Building and loading the CPU kernels: the cache, many workers at once, and machines on which it cannot work."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from morphoquant_vllm import backends
from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu import cache
from morphoquant_vllm.cpu.build import INSTRUCTION_SETS
from morphoquant_vllm.cpu.compiler import BuildError, find_compiler
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "answer.cpp").write_text(SOURCE)
    return directory


@pytest.fixture
def recording(tmp_path: Path) -> tuple[list[str], Path]:
    """The compiler behind a script that writes down each command, and the file it writes to."""
    log, script = tmp_path / "commands", tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {cpu_libraries.compiler()[0]} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return [str(script)], log


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


def test_a_build_is_made_once_and_named_by_its_content(tmp_path: Path, sources: Path, recording) -> None:
    command, log = recording
    cache = tmp_path / "cache"

    def build(instructions: str = "avx2") -> tuple[Path, int]:
        before = log.read_text().count(" -c ") if log.is_file() else 0
        path = cpu_build.build(instructions, command, cache, None, sources=sources)
        return path, log.read_text().count(" -c ") - before

    first, compiled = build()
    assert compiled == 1 and ctypes.CDLL(str(first)).answer() == 42
    assert build() == (first, 0)
    (sources / "header.h").write_text("// a header counts as well\n")
    second, compiled = build()
    assert compiled == 1 and second != first
    third, compiled = build("avx_vnni")
    assert compiled == 1 and third != second
    assert sorted(cache.iterdir()) == sorted((first, second, third)), "nothing half-made is left"


def test_many_workers_may_build_at_once(tmp_path: Path, sources: Path, recording) -> None:
    command, log = recording
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: cpu_build.build("avx2", command, cache, None, sources=sources), range(4)))
    assert log.read_text().count("--version") == 4 and log.read_text().count(" -c ") == 1, "one compiles, three wait"
    assert len(set(built)) == 1 and list(cache.iterdir()) == [built[0]]
    assert ctypes.CDLL(str(built[0])).answer() == 42


def test_a_failed_build_leaves_nothing_and_quotes_the_compiler(tmp_path: Path, sources: Path) -> None:
    (sources / "answer.cpp").write_text("#error broken on purpose\n")
    with pytest.raises(BuildError, match="broken on purpose"):
        cpu_build.build("avx2", cpu_libraries.compiler(), tmp_path / "cache", None, sources=sources)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"cannot write to .*file/cache.*MORPHOQUANT_CACHE"):
        cpu_build.build("avx2", cpu_libraries.compiler(), tmp_path / "file" / "cache", None, sources=sources)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(BuildError, match="does not load"):
        cpu_build.load(tmp_path / "broken.so", "avx2")


def test_a_library_that_is_not_ours_is_refused(tmp_path: Path, sources: Path) -> None:
    built = cpu_build.build("avx2", cpu_libraries.compiler(), tmp_path / "cache", None, sources=sources)
    with pytest.raises(BuildError, match=r"does not load.*morphoquant_act_quant"):
        cpu_build.load(built, "avx2")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_another(path: Path) -> None:
    (path.parent / "other.cpp").write_text('extern "C" int answer() { return 13; }')
    command = [*cpu_libraries.compiler(), "-shared", "-fPIC", str(path.parent / "other.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    (path.parent / "other.cpp").unlink()


def replace_by_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        replace_by_another,
        replace_by_a_fifo,
        lambda path: os.truncate(path, 0),
        # Others could have put anything into it.
        lambda path: path.chmod(0o666),
    ],
    ids=["cut", "flipped", "another", "fifo", "empty", "writable by others"],
)
def test_a_library_that_is_not_what_was_built_is_built_anew(
    damage: Callable[[Path], None], tmp_path: Path, sources: Path
) -> None:
    """Loaded as it is, it would end the process with SIGBUS, or run another user's code."""

    def build() -> Path:
        return cpu_build.build("avx2", cpu_libraries.compiler(), tmp_path / "cache", None, sources=sources)

    path = build()
    damage(path)
    assert build() == path and list(path.parent.iterdir()) == [path]
    assert ctypes.CDLL(str(path)).answer() == 42
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_new_library_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *of: (steps.append("fsync"), fsync(*of)))
    monkeypatch.setattr(os, "replace", lambda *of: (steps.append("replace"), replace(*of)))
    cpu_build.build("avx2", cpu_libraries.compiler(), tmp_path / "cache", None, sources=sources)
    assert steps == ["fsync", "replace", "fsync"]


def test_a_relative_cache_is_taken_from_here(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MORPHOQUANT_CACHE", "cache")
    built = cpu_build.build("avx2", cpu_libraries.compiler(), Path("cache"), None, sources=sources)
    assert built.parent == tmp_path / "cache" == cpu_build.cache_directory()


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


def write_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (r"printf '\377 error\n' >&2; exit 1", "� error"),
        ("sleep 60 & wait", "hangs"),
        # What it starts in a session of its own holds its output open.
        ("setsid sleep 60 & wait", "hangs"),
        ("kill -9 $$", "exit code -9"),
    ],
    ids=["no UTF-8", "hangs", "hangs with a daemon", "killed"],
)
def test_a_compiler_that_does_not_work_ends_in_one_line(
    script: str, expected: str, tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_build, "BUILD_TIMEOUT", 0.5)
    started = time.monotonic()
    with pytest.raises(BuildError, match=expected):
        cpu_build.build("avx2", [write_compiler(tmp_path / "cxx", script)], tmp_path / "cache", None, sources=sources)
    assert time.monotonic() - started < 20, "what the compiler has started ends with it"


def test_a_build_takes_as_long_as_the_whole_may_take(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each of its commands."""
    monkeypatch.setattr(cpu_build, "BUILD_TIMEOUT", 2.0)
    (sources / "second.cpp").write_text("")
    started = time.monotonic()
    with pytest.raises(BuildError, match="hangs"):
        cpu_build.build(
            "avx2", [write_compiler(tmp_path / "cxx", "sleep 0.9")], tmp_path / "cache", None, sources=sources
        )
    assert time.monotonic() - started < 2.7


@pytest.mark.parametrize("name", ["my g++", "it's", 'a"b'])
def test_a_compiler_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_compiler(tmp_path / name, "exit 0")
    monkeypatch.setenv("CXX", path)
    assert find_compiler() == [path]


def test_the_log_says_that_kernels_are_compiled_before_they_are(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cpu_build.logger, "info", lambda text, *of: lines.append(text % of))
    command = write_compiler(tmp_path / "cxx", '[ "$1" = --version ] || { echo "no error" >&2; exit 1; }')
    for _ in range(2):
        with pytest.raises(BuildError, match="no error"):
            cpu_build.build("avx2", [command], tmp_path / "cache", None, sources=sources)
    assert lines == [f"MorphoQuant: compiling the CPU kernels with {command}, once, into {tmp_path / 'cache'}"] * 2


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
        # Instruction sets that have not run on a processor are used on request.
        ("avx2 fma f16c avx_vnni", "", "avx2"),
        ("avx2 fma f16c avx_vnni", "avx_vnni", "avx_vnni"),
        # A part of AVX512 does not serve.
        ("avx2 fma f16c avx512f avx512_vnni", "", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni", "avx512_vnni", "avx512_vnni"),
    ],
)
def test_an_instruction_set_is_chosen(tmp_path: Path, flags: str, choice: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse2\nflags\t\t: other\n")
    assert cpu_build.instruction_set(cpu_build.cpu_flags(tmp_path / "cpuinfo"), choice) == expected


@pytest.mark.parametrize("choice", ["avx512_vnni", "neon"])
def test_an_instruction_set_that_is_not_there_is_refused(choice: str) -> None:
    with pytest.raises(BuildError, match=rf"MORPHOQUANT_CPU={choice}: not .* it has \['avx2'\]"):
        cpu_build.instruction_set(frozenset(("avx2", "fma", "f16c")), choice)


def test_an_old_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx\n")
    for path in (tmp_path / "cpuinfo", tmp_path / "none"):
        with pytest.raises(BuildError, match="need AVX2, FMA and F16C, which this processor lacks"):
            cpu_build.instruction_set(cpu_build.cpu_flags(path))


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
