"""Building the CPU kernels: the cache, many workers at once, damaged libraries, and compilers that do not work."""

import ctypes
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from morphoquant_vllm.cpu import build as cpu_build
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


def test_a_library_for_this_very_processor_is_not_taken_by_another(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines may share a home; instructions that one of them lacks end a process."""
    names = []
    for more in ("", "-march=native"):
        command = [*cpu_libraries.compiler(), *([more] if more else [])]
        for flags in (frozenset({"avx2"}), frozenset({"avx2", "avx512_bf16"})):
            monkeypatch.setattr(cpu_build, "cpu_flags", lambda flags=flags: flags)
            names.append(cpu_build.build("avx2", command, tmp_path / "cache", None, sources=sources).name)
    assert names[0] == names[1] and len(set(names)) == 3


@pytest.mark.parametrize("flag", ["-ffast-math", "-funsafe-math-optimizations", "-Ofast"])
def test_a_user_s_flags_do_not_change_the_arithmetic_of_the_process(tmp_path: Path, sources: Path, flag: str) -> None:
    """gcc 12 links code that sets the processor to flush small numbers to 0."""
    command = [*cpu_libraries.compiler(), flag]
    built = cpu_build.build("avx2", command, tmp_path / "cache", None, sources=sources)
    code = f"import ctypes; small = 1e-320; ctypes.CDLL({str(built)!r}); assert small * 0.5 > 0"
    subprocess.run([sys.executable, "-c", code], check=True)


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
