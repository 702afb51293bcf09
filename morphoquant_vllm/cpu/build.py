"""Build and load the CPU kernels: compiled with the machine's g++ at first use, then kept in a cache.

The cache is a directory of shared objects, named by a hash of all that decides their content. A build is written
beside its place and moved there in one step, so that any number of workers may start at once: at worst several compile
the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from morphoquant_vllm import environment

logger = logging.getLogger("vllm.morphoquant_vllm.cpu.build")

SOURCES = Path(__file__).parent / "kernels"
# Instruction sets, best first: the flags in /proc/cpuinfo that they need, and what tells the compiler so.
_BASE_CPU, _BASE_FLAGS = ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_vnni": (
        (*_BASE_CPU, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        (*_BASE_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    ),
    "avx_vnni": ((*_BASE_CPU, "avx_vnni"), (*_BASE_FLAGS, "-mavxvnni")),
    "avx2": (_BASE_CPU, _BASE_FLAGS),
}
# Those that have run on a processor, best first. The other has been compiled; environment.CPU turns it on.
RUN_ON_HARDWARE = ("avx512_vnni", "avx2")
# No contraction: the quantizer rounds after each operation, as torch does. The warning is false in gcc 12's headers.
COMPILE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wno-maybe-uninitialized")
# A compiler that takes longer than this hangs (s).
COMPILE_TIMEOUT = 600


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message says why and what helps."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library: functions of a packed Request (cpu/kernels/record.h), HeadCall (head.h) or HeadBFloat16Call.

    They return 0, 1 for a bad row, 2 for a bad record, 3 without memory. `head_bfloat16` is None where the processor
    has no AVX512-BF16.
    """

    act_quant: Callable[[bytes], int]
    linear: Callable[[bytes], int]
    head: Callable[[bytes], int]
    request_size: int
    instructions: str
    head_bfloat16: Callable[[bytes], int] | None = None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor can do, by the kernel's names; empty where that is not known."""
    if not cpuinfo.is_file():
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def instruction_set(flags: frozenset[str], choice: str = "") -> str:
    """The instruction set that serves on a processor with `flags`: `choice`, else the best that has run on hardware.

    Raises BuildError where the processor has none, or not the one that is asked for.
    """
    if choice:
        if choice not in INSTRUCTION_SETS or not flags.issuperset(INSTRUCTION_SETS[choice][0]):
            here = [name for name, (needed, _) in INSTRUCTION_SETS.items() if flags.issuperset(needed)]
            raise BuildError(f"{environment.CPU}={choice}: not an instruction set of this processor; it has {here}")
        return choice
    for name in RUN_ON_HARDWARE:
        if flags.issuperset(INSTRUCTION_SETS[name][0]):
            return name
    raise BuildError("the processor has no AVX2, FMA and F16C; nothing helps but another machine")


def find_compiler() -> list[str]:
    """Command of the C++ compiler: the user's, else g++ or c++. Raises BuildError where there is none."""
    command = environment.compiler()
    for name in (command[0],) if command else ("g++", "c++"):
        if found := shutil.which(name):
            return [found, *command[1:]]
    raise BuildError(
        f"no C++ compiler ({command[0] if command else 'g++'}); install g++ or set {environment.CXX} to one"
    )


def torch_openmp(maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The OpenMP library that torch has loaded: its threads are the ones that vLLM binds to cores.

    Other packages may have brought their own copies; torch's lies in its own directory, if it bundles one.
    """
    if not maps.is_file():
        return None
    paths = dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\s]*\.so\S*)$", maps.read_text(), re.MULTILINE))
    site = Path(torch.__file__).parent
    own = [path for path in paths if Path(path).parent in (site / "lib", site.parent / "torch.libs")]
    shared = [path for path in paths if not Path(path).parent.name.endswith(".libs")]
    return next((Path(path) for path in (*own, *shared)), None)


def build(
    instructions: str,
    compiler: Sequence[str],
    directory: Path,
    openmp: Path | None,
    extra: Sequence[str] = (),
    sources: Path = SOURCES,
) -> Path:
    """Compile `sources` for an instruction set unless the cache has them; the shared object in `directory`.

    `openmp` is the library to link with (the compiler's own where None), `extra` are further compiler flags. Raises
    BuildError with the compiler's first complaint, or the reason why the directory cannot be written.
    """
    define = f"-DMORPHOQUANT_{instructions.upper()}"
    flags = [*COMPILE_FLAGS, *INSTRUCTION_SETS[instructions][1], define, *extra]
    files = sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp"))
    digest = hashlib.sha256()
    version = _run([*compiler, "--version"]).stdout
    for part in (*compiler, version, *flags, str(openmp), *(path.name + "\0" + path.read_text() for path in files)):
        digest.update(part.encode() + b"\0")
    target = directory / f"cpu-{instructions}-{digest.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            made = Path(scratch) / target.name
            objects = []
            for source in (path for path in files if path.suffix == ".cpp"):
                objects.append(f"{scratch}/{source.stem}.o")
                _run([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
            # Linked by name, and not by -fopenmp: that would bring in the compiler's own copy of the library.
            library = [str(openmp)] if openmp else ["-fopenmp"]
            _run([*compiler, *extra, "-shared", *objects, *library, "-o", str(made)])
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write to {directory} ({error.strerror}); set {environment.CACHE}") from error
    return target


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {first}; g++ 11 or newer is known to work") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run ({error}); install g++ or set {environment.CXX} to one") from error


def load(path: Path, instructions: str) -> Kernels:
    """Load a built library. Raises BuildError where the system refuses it."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} does not load ({error}); remove it, and set {environment.CXX} to g++ if it is another"
        ) from error
    functions = (library.morphoquant_act_quant, library.morphoquant_linear, library.morphoquant_head)
    head_bfloat16 = library.morphoquant_head_bfloat16
    for function in (*functions, head_bfloat16):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    library.morphoquant_request_size.restype = ctypes.c_int64
    return Kernels(
        *functions,
        request_size=library.morphoquant_request_size(),
        instructions=instructions,
        head_bfloat16=head_bfloat16 if library.morphoquant_has_head_bfloat16() else None,
    )


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this machine, or None after one warning that says why there are none and what helps."""
    try:
        instructions = instruction_set(cpu_flags(), environment.cpu_instructions())
        built = build(instructions, find_compiler(), environment.cache_directory(), torch_openmp())
        return load(built, instructions)
    except BuildError as error:
        logger.warning("MorphoQuant: the slow torch reference serves on this CPU: %s", error)
        return None
