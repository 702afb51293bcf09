"""Build and load the CPU kernels: compiled with the machine's g++ at first use, then kept in a cache.

The cache is a directory of shared objects, named by a hash of all that decides their content. A build is written
beside its place and moved there in one step, so that any number of workers may start at once: at worst several compile
the same. A library that is damaged, or that another user may have written, is never loaded: it is built anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from morphoquant_vllm import environment
from morphoquant_vllm.cpu.cache import is_intact, put, usable_directory
from morphoquant_vllm.errors import one_line

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
# A compiler that takes longer than this for a file hangs (s).
COMPILE_TIMEOUT = 120


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
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
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
    try:
        command = environment.compiler()
    except ValueError as error:
        raise BuildError(f"{environment.CXX} is no command ({error}); set it to a C++ compiler, such as g++") from error
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
    mapped = os.fsdecode(maps.read_bytes())
    paths = dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\s]*\.so\S*)$", mapped, re.MULTILINE))
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
    directory = directory.absolute()
    version = _run([*compiler, "--version"])
    for part in (*compiler, version, *flags, str(openmp), *(path.name + "\0" + path.read_text() for path in files)):
        digest.update(os.fsencode(part) + b"\0")
    target = directory / f"cpu-{instructions}-{digest.hexdigest()[:24]}.so"
    try:
        if is_intact(target):
            return target
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
            put(made, target)
    except OSError as error:
        raise BuildError(f"cannot write to {directory} ({error.strerror}); set {environment.CACHE}") from error
    return target


def _run(command: list[str]) -> str:
    """What a command prints. Raises BuildError where it fails, hangs or cannot be started."""
    try:
        # A session of its own: whatever the compiler has started ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            output, complaint = process.communicate(timeout=COMPILE_TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    except subprocess.TimeoutExpired as error:
        raise BuildError(
            f"{command[0]} hangs ({COMPILE_TIMEOUT} s were not enough); set {environment.CXX} to g++"
        ) from error
    except OSError as error:
        raise BuildError(
            f"{command[0]} does not run ({error.strerror}); install g++ or set {environment.CXX} to one"
        ) from error
    if process.returncode:
        lines = complaint.strip().splitlines() or [f"exit code {process.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {first}; g++ 11 or newer is known to work")
    return output


def load(path: Path, instructions: str) -> Kernels:
    """Load a built library. Raises BuildError where the system refuses it."""
    try:
        library = ctypes.CDLL(str(path.absolute()))
        functions = (library.morphoquant_act_quant, library.morphoquant_linear, library.morphoquant_head)
        head_bfloat16 = library.morphoquant_head_bfloat16
        request_size, has_head_bfloat16 = library.morphoquant_request_size, library.morphoquant_has_head_bfloat16
    # ValueError: the loader's message quotes bytes of a damaged file. AttributeError: another library.
    except (OSError, ValueError, AttributeError) as error:
        raise BuildError(
            f"{path} does not load ({error}); remove it, and set {environment.CXX} to g++ if it is another"
        ) from error
    for function in (*functions, head_bfloat16):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    request_size.restype = ctypes.c_int64
    return Kernels(
        *functions,
        request_size=request_size(),
        instructions=instructions,
        head_bfloat16=head_bfloat16 if has_head_bfloat16() else None,
    )


def cache_directory() -> Path:
    """Where built kernels are kept. Raises BuildError where there is no such place."""
    directory = environment.cache_directory()
    if directory is None:
        raise BuildError(f"there is no home directory for the built kernels; set {environment.CACHE} to a directory")
    return directory


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this machine, or None after one warning that says why there are none and what helps."""
    try:
        instructions = instruction_set(cpu_flags(), environment.cpu_instructions())
        compiler = find_compiler()
        with usable_directory(cache_directory()) as directory:
            return load(build(instructions, compiler, directory, torch_openmp()), instructions)
    except (BuildError, OSError) as error:
        logger.warning("MorphoQuant: the slow torch reference serves on this CPU: %s", one_line(str(error)))
        return None
