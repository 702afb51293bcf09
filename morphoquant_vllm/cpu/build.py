"""Build and load the CPU kernels: those of the wheel, else compiled with g++ at first use and kept in a cache.

The cache is a directory of shared objects. A hash of everything that decides a library's content names its file. A
build is written to a scratch folder and moved into the cache in one step. Any number of workers may start at once: one
compiles, the others wait for it. A library that is damaged, or that another user may have written, is never loaded: it
is built anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from morphoquant_vllm import environment
from morphoquant_vllm.cpu.cache import is_intact, one_build, put, runs_programs, usable_directory
from morphoquant_vllm.cpu.compiler import BUILD_TIMEOUT, BuildError, CompileError, find_compiler, run
from morphoquant_vllm.errors import one_line

logger = logging.getLogger("vllm.morphoquant_vllm.cpu.build")

SOURCES = Path(__file__).parent / "kernels"
# Instruction sets, best first: the flags in /proc/cpuinfo that they need, and the compiler's flags.
_BASE_CPU, _BASE_FLAGS = ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_vnni": (
        (*_BASE_CPU, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        (*_BASE_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    ),
    "avx_vnni": ((*_BASE_CPU, "avx_vnni"), (*_BASE_FLAGS, "-mavxvnni")),
    "avx2": (_BASE_CPU, _BASE_FLAGS),
}
# After a user's flags: a library that is linked with -ffast-math lets the whole process flush small numbers to 0.
EXACT_FLAGS = ("-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations")
# No contraction: the quantizer rounds after each operation, as torch does. gcc 12's headers cause the false warning.
COMPILE_FLAGS = ("-std=c++17", *EXACT_FLAGS, "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wno-maybe-uninitialized")


@dataclass(frozen=True)
class Kernels:
    """The loaded library: functions of a packed Request, HeadCall, ExpertsRequest or HeadBFloat16Call (cpu/kernels/).

    They return 0, 1 for a bad row, 2 for a bad record, 3 if memory is exhausted. `head_bfloat16` is None if the
    processor lacks AVX512-BF16.
    """

    act_quant: Callable[[bytes], int]
    linear: Callable[[bytes], int]
    head: Callable[[bytes], int]
    experts: Callable[[bytes], int]
    request_size: int
    instructions: str
    head_bfloat16: Callable[[bytes], int] | None = None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's features by the Linux kernel's names; empty if they are unknown."""
    if not cpuinfo.is_file():
        return frozenset()
    match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def instruction_sets(flags: frozenset[str], choice: str = "") -> list[str]:
    """The instruction sets for a processor with `flags`, best first: `choice` alone, else all that it has.

    Raises BuildError if the processor supports none, or not `choice`.
    """
    supported = [name for name, (needed, _) in INSTRUCTION_SETS.items() if flags.issuperset(needed)]
    if choice and choice not in supported:
        raise BuildError(f"{environment.CPU}={choice}: not an instruction set of this processor; it has {supported}")
    if not supported:
        raise BuildError(
            "the CPU kernels need AVX2, FMA and F16C, which this processor lacks; serve on another machine"
        )
    return [choice] if choice else supported


def torch_openmp(maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The OpenMP library that torch has loaded: vLLM binds its threads to cores.

    Other packages may bundle further copies. If torch bundles one, it lies in torch's directory.
    """
    if not maps.is_file():
        return None
    mapped = os.fsdecode(maps.read_bytes())
    paths = dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\s]*\.so\S*)$", mapped, re.MULTILINE))
    # Not imported: wheels are built in an environment without torch.
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    site = Path(spec.origin).parent
    bundled = [path for path in paths if Path(path).parent in (site / "lib", site.parent / "torch.libs")]
    shared = [path for path in paths if not Path(path).parent.name.endswith(".libs")]
    return next((Path(path) for path in (*bundled, *shared)), None)


def build(
    instructions: str,
    compiler: Sequence[str],
    directory: Path,
    openmp: Path | None,
    extra: Sequence[str] = (),
    sources: Path = SOURCES,
) -> Path:
    """Compile `sources` for an instruction set unless `directory` holds the library; the path of the shared object.

    `openmp` is the library to link with (None: the compiler's), `extra` are further compiler flags. Raises BuildError
    with the compiler's first error, or the reason why the directory cannot be written.
    """
    define = f"-DMORPHOQUANT_{instructions.upper()}"
    flags = [*COMPILE_FLAGS, *INSTRUCTION_SETS[instructions][1], define, *extra]
    deadline = time.monotonic() + BUILD_TIMEOUT
    directory = directory.absolute()
    target = directory / _library_name(instructions, compiler, flags, openmp, sources, deadline)
    try:
        if is_intact(target):
            return target
        directory.mkdir(parents=True, exist_ok=True, mode=stat.S_IRWXU)
        with one_build(directory, lambda: is_intact(target), deadline) as scratch:
            if not is_intact(target):
                logger.info("MorphoQuant: compiling the CPU kernels with %s, once, into %s", compiler[0], directory)
                made = scratch / target.name
                # Linked by path: -fopenmp would add the compiler's copy of the library.
                _compile(
                    made, [*compiler], flags, [*extra], [str(openmp)] if openmp else ["-fopenmp"], sources, deadline
                )
                put(made, target)
    except TimeoutError as error:
        raise BuildError(
            f"another process builds in {directory} for {BUILD_TIMEOUT} s already; start again when it has ended"
        ) from error
    except OSError as error:
        raise BuildError(f"cannot write to {directory} ({error.strerror}); set {environment.CACHE}") from error
    return target


def _sources(sources: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in sources.iterdir() if path.suffix in suffixes)


def _library_name(
    instructions: str,
    compiler: Sequence[str],
    flags: Sequence[str],
    openmp: Path | None,
    sources: Path,
    deadline: float,
) -> str:
    """File name of a library: a hash of all that decides its content."""
    digest = hashlib.sha256()
    for part in (*compiler, run([*compiler, "--version"], deadline), *flags, str(openmp)):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    if any("=native" in part for part in compiler):
        # Machines that share a home may differ in instructions beyond those of the set.
        digest.update(" ".join(sorted(cpu_flags())).encode())
    for path in _sources(sources, ".h", ".cpp"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"cpu-{instructions}-{digest.hexdigest()[:24]}.so"


def _compile(
    made: Path,
    compiler: list[str],
    flags: list[str],
    extra: list[str],
    libraries: list[str],
    sources: Path,
    deadline: float,
) -> None:
    """Compile and link the library `made`, with objects beside it."""
    objects = []
    for source in _sources(sources, ".cpp"):
        objects.append(str(made.with_name(f"{source.stem}.o")))
        run([*compiler, *flags, "-c", str(source), "-o", objects[-1]], deadline)
    run([*compiler, *EXACT_FLAGS, *extra, "-shared", *objects, *libraries, "-o", str(made)], deadline)


def load(path: Path, instructions: str) -> Kernels:
    """Load a built library. Raises BuildError if the system refuses it."""
    try:
        library = ctypes.CDLL(str(path.absolute()))
        act_quant, linear = library.morphoquant_act_quant, library.morphoquant_linear
        head, experts = library.morphoquant_head, library.morphoquant_experts
        head_bfloat16 = library.morphoquant_head_bfloat16
        request_size, has_head_bfloat16 = library.morphoquant_request_size, library.morphoquant_has_head_bfloat16
    # ValueError: the loader's message quotes bytes of a damaged file. AttributeError: it is another library.
    except (OSError, ValueError, AttributeError) as error:
        remedy = f"remove it, and set {environment.CXX} to g++ if it names another compiler"
        if path.exists() and not runs_programs(path.parent):
            remedy = f"set {environment.CACHE} or TMPDIR to a folder that is not mounted with noexec"
        raise BuildError(f"{path} does not load ({error}); {remedy}") from error
    for function in (act_quant, linear, head, experts, head_bfloat16):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    request_size.restype = ctypes.c_int64
    return Kernels(
        act_quant,
        linear,
        head,
        experts,
        request_size=request_size(),
        instructions=instructions,
        head_bfloat16=head_bfloat16 if has_head_bfloat16() else None,
    )


def cache_directory() -> Path:
    """The directory of built kernels. Raises BuildError if there is none."""
    directory = environment.cache_directory()
    if directory is None:
        raise BuildError(f"no home directory exists for the built kernels; set {environment.CACHE} to a directory")
    return directory


def _build_and_load(instructions: str, compiler: Sequence[str], directory: Path) -> Kernels:
    """The kernels of a directory; a library that does not load, as one from another system, is built anew once."""
    path = build(instructions, compiler, directory, torch_openmp())
    try:
        return load(path, instructions)
    except BuildError:
        path.unlink(missing_ok=True)
    return load(build(instructions, compiler, directory, torch_openmp()), instructions)


@functools.cache
def kernels() -> Kernels | None:
    """The kernels for this machine, or None after one warning that names the reason and the remedy."""
    try:
        best, *others = instruction_sets(cpu_flags(), environment.cpu_instructions())
        try:
            return _kernels_of(best)
        except CompileError as error:
            # An old compiler does not know new instructions.
            if not others:
                raise
            found = _kernels_of(others[-1])
            logger.warning("MorphoQuant: no kernels for %s, so %s serves: %s", best, others[-1], one_line(str(error)))
            return found
    except (BuildError, OSError) as error:
        logger.warning("MorphoQuant: the slow torch reference serves on this CPU: %s", one_line(str(error)))
        return None


def _kernels_of(instructions: str) -> Kernels:
    """The wheel's kernels of an instruction set, else compiled ones."""
    from morphoquant_vllm.cpu import shipped

    if (prebuilt := shipped.load(instructions)) is not None:
        return prebuilt
    compiler = find_compiler()
    with usable_directory(cache_directory()) as directory:
        return _build_and_load(instructions, compiler, directory)
