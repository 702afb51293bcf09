"""CPU kernels that a wheel brings: compiled when the wheel is built, and loaded if the sources are still those.

A library in `prebuilt/` is linked without OpenMP. At run time its functions are found in the library that torch has
loaded, so there is one set of threads. Imports the standard library only when a wheel is built.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from morphoquant_vllm.cpu import build
from morphoquant_vllm.cpu.compiler import BUILD_TIMEOUT, BuildError, CompileError, run

FOLDER = Path(__file__).parent / "prebuilt"
MANIFEST = "manifest.json"
# Every processor with AVX2 runs one of these. AVX512-BF16 needs no library of its own: avx512_vnni asks the processor.
SHIPPED = tuple(build.INSTRUCTION_SETS)
# The C++ and GCC libraries of the machine may be older than those of the compiler, so they are linked in.
LINK_FLAGS = ("-static-libstdc++", "-static-libgcc", "-s")


def sources_digest(sources: Path = build.SOURCES) -> str:
    """SHA-256 of the kernels' sources and flags; a library of other sources is not loaded."""
    digest = hashlib.sha256(repr((build.COMPILE_FLAGS, build.INSTRUCTION_SETS)).encode())
    for path in sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_all(folder: Path, compiler: Sequence[str], sources: Path = build.SOURCES) -> None:
    """Compile the libraries of SHIPPED into `folder`, with their manifest.

    One whose instructions the compiler does not know is left out. Raises BuildError if the compiler fails for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for instructions in SHIPPED:
        target = folder / f"cpu-{instructions}.so"
        try:
            _compile(target, instructions, compiler, sources)
        except CompileError:
            if instructions == SHIPPED[-1]:
                raise
            continue
        digests[target.name] = hashlib.sha256(target.read_bytes()).hexdigest()
    content = {"sources": sources_digest(sources), "libraries": digests}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _compile(target: Path, instructions: str, compiler: Sequence[str], sources: Path) -> None:
    """Compile the library `target` for an instruction set."""
    deadline = time.monotonic() + BUILD_TIMEOUT
    flags = [*build.COMPILE_FLAGS, *build.INSTRUCTION_SETS[instructions][1]]
    with TemporaryDirectory() as scratch:
        objects = []
        for source in sorted(sources.glob("*.cpp")):
            objects.append(f"{scratch}/{source.stem}.o")
            define = f"-DMORPHOQUANT_{instructions.upper()}"
            run([*compiler, *flags, define, "-c", str(source), "-o", objects[-1]], deadline)
        # Without -fopenmp: no OpenMP library is named, and torch's has the functions.
        run([*compiler, *build.EXACT_FLAGS, "-shared", *LINK_FLAGS, *objects, "-o", str(target)], deadline)


def find(instructions: str, folder: Path = FOLDER, sources: Path = build.SOURCES) -> Path | None:
    """The library of an instruction set, undamaged and of these sources; None if the package brings none."""
    target = folder / f"cpu-{instructions}.so"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["sources"] != sources_digest(sources):
            return None
        # A truncated library would end the process with SIGBUS.
        is_intact = hashlib.sha256(target.read_bytes()).hexdigest() == manifest["libraries"][target.name]
    # A package without prebuilt kernels, or a damaged one.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return target if is_intact else None


def load(instructions: str, folder: Path = FOLDER) -> build.Kernels | None:
    """The prebuilt kernels; None if there are none, or if this machine cannot load them."""
    path, openmp = find(instructions, folder), build.torch_openmp()
    if path is None or openmp is None:
        return None
    try:
        # Its functions become visible to libraries that are loaded after it.
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        # All symbols now: a missing one must not end the process at the first call.
        ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        return build.load(path, instructions)
    except (OSError, BuildError) as error:
        build.logger.info("MorphoQuant: the package's %s does not load here (%s), so it is compiled", path.name, error)
        return None
