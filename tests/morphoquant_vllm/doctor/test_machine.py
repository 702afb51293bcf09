"""The machine's facts: a healthy one, and each lack with its remedy."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from morphoquant_vllm.cpu import build, cache, shipped
from morphoquant_vllm.doctor import machine
from morphoquant_vllm.doctor.finding import Finding

AVX2 = frozenset(("avx2", "fma", "f16c"))


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 10), "problem"), ((3, 11), "ok"), ((3, 12), "note"), ((3, 13), "note"), ((3, 14), "problem")],
)
def test_the_pythons_of_the_package(version: tuple[int, int], state: str) -> None:
    assert only(machine.python(version)).state == state


def test_the_supported_pythons_are_those_of_the_metadata() -> None:
    text = (Path(machine.__file__).parents[2] / "pyproject.toml").read_text()
    (major, oldest), (_, newest) = machine.OLDEST, machine.NEWEST
    assert f'requires-python = ">={major}.{oldest},<{major}.{newest + 1}"' in text


@pytest.mark.parametrize(
    ("flags", "choice", "state", "words"),
    [
        (AVX2, "", "ok", "avx2"),
        (AVX2 | {"avx512_bf16"}, "avx2", "ok", "avx2,"),
        (frozenset({"sse2"}), "", "note", "which this processor lacks"),
        (AVX2, "avx512_vnni", "problem", "MORPHOQUANT_CPU=avx512_vnni"),
    ],
)
def test_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], choice: str, state: str, words: str
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: flags)
    monkeypatch.setenv("MORPHOQUANT_CPU", choice)
    finding = only(machine.processor())
    assert finding.state == state and words in finding.text
    assert (finding.state == "ok") == (not finding.remedy)


def test_a_missing_compiler_is_a_problem_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = only(machine.compiler(has_gpu=False))
    assert finding.state == "problem"
    assert "--enforce-eager" in finding.text and "install g++" in finding.remedy
    assert only(machine.compiler(has_gpu=True)).state == "note"
    monkeypatch.setattr(shipped, "find", lambda instructions: Path("prebuilt"))
    brought = only(machine.compiler(has_gpu=False))
    assert brought.state == "note" and "the wheel brings the kernels, but `vllm serve` needs --enf" in brought.text
    monkeypatch.delenv("MORPHOQUANT_CPU", raising=False)
    assert "kernels of the wheel" in only(machine.processor()).text


def test_a_gpu_serves_without_a_compiler_on_a_processor_that_no_kernel_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a GH200, whose /proc/cpuinfo has no flags."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "cpu_flags", frozenset)
    found = only(machine.compiler(has_gpu=True))
    assert found.state == "note" and "a GPU needs none" in found.text


def test_a_compiler_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert only(machine.compiler(has_gpu=False)).state == "problem"


@pytest.mark.parametrize(
    ("content", "words"),
    [("no program", "Exec format error"), ("#!/bin/sh\nsleep 60\n", "hangs (1 s were not enough)")],
)
def test_a_compiler_that_does_not_run_or_hangs_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "cxx").write_text(content)
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    monkeypatch.setattr(machine, "COMPILER_TIMEOUT", 1)
    found = only(machine.compiler(has_gpu=False))
    assert found.state == "problem" and words in found.text and "set CXX" in found.remedy


def test_a_compiler_s_name_that_is_too_long_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g" * 5000)
    assert "no C++ compiler" in only(machine.compiler(has_gpu=False)).text


@pytest.mark.parametrize("name", ["loop", "loop/cache", "n" * 300])
def test_a_cache_that_can_never_be_made_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / name))
    found = only(machine.cache())
    assert found.state == "problem" and found.remedy == "set MORPHOQUANT_CACHE to another directory"


def test_a_cache_from_which_nothing_runs_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "runs_programs", lambda directory: False)
    found = only(machine.cache())
    assert found.state == "note" and "mounted with noexec" in found.text


def test_the_cache_folder_and_its_owner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / "new" / "cache"))
    assert "not made yet" in only(machine.cache()).text
    (tmp_path / "new" / "cache").mkdir(parents=True, mode=0o700)
    (tmp_path / "new" / "cache" / "cpu-avx2-1.so").write_bytes(b"")
    found = only(machine.cache())
    assert (found.state, "1 built" in found.text, "owned by" in found.text) == ("ok", True, True)
    (tmp_path / "new" / "cache").chmod(0o777)
    shared = only(machine.cache())
    assert shared.state == "note" and shared.remedy.startswith("chmod go-w")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORPHOQUANT_CACHE", str(tmp_path / "file"))
    assert only(machine.cache()).state == "problem"


def test_a_gpu_beside_a_torch_that_cannot_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 0\n")
    driver.chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(machine.gpu()).state == "problem"
    driver.write_text("#!/bin/sh\nexit 9\n")
    assert only(machine.gpu()).state == "ok"


def test_a_doctor_runs_without_torch(tmp_path: Path) -> None:
    """Its modules are imported one by one, and each missing one is a line."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('gone', name='torch')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from morphoquant_vllm.doctor import examine, server\n"
        "server.interfaces = server.media = lambda *given: []; server.needed_mends = list\n"
        "print(examine.as_text(examine.examine()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PROBLEM  torch" in done.stdout and "'torch' is missing" in done.stdout
    assert "vllm" in done.stdout
