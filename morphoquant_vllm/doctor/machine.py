"""What the machine offers: Python, torch, processor, kernels, compiler, GPU, cache folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from morphoquant_vllm import environment
from morphoquant_vllm.doctor.finding import Finding, note, ok, problem

# The Pythons of pyproject.toml's requires-python, and the tested one.
OLDEST, NEWEST, TESTED = (3, 11), (3, 13), (3, 11)
# Seconds after which nvidia-smi, or a compiler that is asked for its version, is considered to hang.
DRIVER_TIMEOUT = COMPILER_TIMEOUT = 20


def python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    """The running Python against the versions of pyproject.toml."""
    shown = platform.python_version()
    if not OLDEST <= version <= NEWEST:
        yield problem("python", f"{shown} is not supported", "use Python 3.11, 3.12 or 3.13")
    elif version != TESTED:
        yield note("python", f"{shown}; all tests ran on 3.11")
    else:
        yield ok("python", f"{shown}, {sys.executable}")


def torch_build() -> Iterator[Finding]:
    """The version of torch, if it can be imported."""
    import torch

    yield ok("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def processor() -> Iterator[Finding]:
    """The instruction set that the CPU kernels would use."""
    from morphoquant_vllm.cpu import build, shipped
    from morphoquant_vllm.cpu.compiler import BuildError

    flags = build.cpu_flags()
    try:
        chosen = build.instruction_sets(flags, environment.cpu_instructions())[0]
    except BuildError as error:
        reason, _, remedy = str(error).rpartition("; ")
        if reason and not environment.cpu_instructions():
            yield note("processor", reason, f"{remedy}, or on a GPU; here the slow torch reference computes")
        else:
            yield problem("processor", str(error), f"unset {environment.CPU}")
        return
    bfloat16 = ", AVX512-BF16 for lm_head" if chosen == "avx512_vnni" and "avx512_bf16" in flags else ""
    kernels = "kernels of the wheel" if shipped.find(chosen) else "kernels are compiled at first use"
    yield ok("processor", f"{chosen}{bfloat16}, {os.cpu_count()} cores; {kernels}")


def compiler(has_gpu: bool) -> Iterator[Finding]:
    """The C++ compiler of the CPU kernels; vLLM's torch.compile needs one, too."""
    from morphoquant_vllm.cpu.compiler import BuildError, find_compiler, run

    eager = "`vllm serve` needs --enforce-eager without g++, because torch.compile calls it"
    try:
        command = find_compiler()
        version = run([*command, "--version"], time.monotonic() + COMPILER_TIMEOUT)
    except BuildError as error:
        reason, _, remedy = str(error).rpartition("; ")
        if _wheel_has_kernels():
            yield note("compiler", f"{reason}; the wheel brings the kernels, but {eager}", remedy)
        elif has_gpu:
            yield note("compiler", f"{reason}; a GPU needs none for MorphoQuant's kernels", remedy)
        else:
            yield problem("compiler", f"{reason}; so the slow torch reference computes, and {eager}", remedy)
        return
    yield ok("compiler", f"{command[0]}: {(version.splitlines() or ['?'])[0]}")


def _wheel_has_kernels() -> bool:
    """Whether the package brings kernels that this processor runs."""
    from morphoquant_vllm.cpu import build, shipped

    try:
        chosen = build.instruction_sets(build.cpu_flags(), environment.cpu_instructions())[0]
    except build.BuildError:
        return False
    return shipped.find(chosen) is not None


def gpu() -> Iterator[Finding]:
    """The GPU that torch finds, or the reason why it finds none."""
    import torch

    if torch.cuda.is_available():
        from morphoquant_vllm.gpu.device import device_name, supported
        from morphoquant_vllm.gpu.tiles import architecture_of

        properties = torch.cuda.get_device_properties(0)
        name = device_name(torch.device("cuda", 0))
        text = f"{properties.name}, {name}, {properties.total_memory / 2**30:.1f} GiB"
        count = torch.cuda.device_count()
        yield ok("gpu", f"{count} x {text}") if architecture_of(name) else problem("gpu", text, supported())
    elif _driver_answers():
        yield problem("gpu", "an NVIDIA driver answers, but torch is not a CUDA build", 'pip install "vllm==0.32.*"')
    else:
        yield ok("gpu", "none; the CPU serves")


def has_gpu() -> bool:
    """Whether torch finds a GPU; False if torch itself is broken."""
    try:
        import torch

        return bool(torch.cuda.is_available())
    except Exception:  # a broken torch is a finding of its own
        return False


def gpu_memory() -> tuple[int | None, int]:
    """Bytes of the smallest GPU, None without one; and the number of GPUs."""
    if not has_gpu():
        return None, 0
    import torch

    count = torch.cuda.device_count()
    return min(int(torch.cuda.get_device_properties(index).total_memory) for index in range(count)), count


def _driver_answers() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        return subprocess.run([command, "-L"], capture_output=True, timeout=DRIVER_TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def cache() -> Iterator[Finding]:
    """The folder of built CPU kernels: its owner, and whether it can be written."""
    folder = environment.cache_directory()
    if folder is None:
        yield problem("cache", "no home directory exists", f"set {environment.CACHE} to a directory")
        return
    from morphoquant_vllm.cpu.cache import runs_programs, writable_by_others

    # As the kernels' build takes it.
    folder = Path(os.path.realpath(folder))
    existing = _nearest_existing(folder)
    shown = f"{folder}, {'owned by ' + _owner(existing.stat().st_uid) if existing == folder else 'not made yet'}"
    if refusal := _name_refusal(folder):
        yield problem("cache", f"{folder}: {refusal}", f"set {environment.CACHE} to another directory")
    elif not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield problem("cache", f"{shown}: cannot be written", f"set {environment.CACHE} to another directory")
    elif existing == folder and (open_folder := writable_by_others(folder)) is not None:
        text = f"{shown}: others may write {open_folder}, so kernels are built at each start"
        yield note("cache", text, f"chmod go-w {open_folder}, or set {environment.CACHE}")
    elif not runs_programs(existing):
        text = f"{shown}: mounted with noexec, so kernels are built at each start"
        yield note("cache", text, f"set {environment.CACHE} to another directory")
    else:
        built = sum(path.suffix == ".so" for path in folder.iterdir()) if existing == folder else 0
        yield ok("cache", f"{shown}, {built} built libraries")


def _nearest_existing(folder: Path) -> Path:
    # Not Path.exists, which raises for a name that is too long.
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def _name_refusal(folder: Path) -> str | None:
    """Why no folder of this name can be there: a circle of links, or a name that is too long; None if it can."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    return None


def _owner(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
