"""Builds of the CPU kernels for tests: for this machine, emulated, and with the address sanitizer."""

import subprocess
from pathlib import Path

import pytest

from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu.build import INSTRUCTION_SETS, Kernels
from morphoquant_vllm.cpu.compiler import BuildError, find_compiler

EMULATION = Path(__file__).parents[2] / "simde"


def compiler() -> list[str]:
    """The machine's compiler; skips if there is none."""
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def old_compiler(tmp_path: Path) -> str:
    """A compiler that knows no instructions but AVX2's."""
    script = tmp_path / "g++"
    text = '#!/bin/sh\ncase "$*" in *vnni*) echo "error: unrecognized option" >&2; exit 1;; esac\n'
    script.write_text(f'{text}exec {" ".join(compiler())} "$@"\n')
    script.chmod(0o755)
    return str(script)


def native(instructions: str) -> Kernels:
    """The kernels as they are served; skips if the machine cannot run them."""
    if not cpu_build.cpu_flags().issuperset(INSTRUCTION_SETS[instructions][0]):
        pytest.skip(f"this processor has no {instructions}")
    directory = cpu_build.cache_directory()
    return cpu_build.load(cpu_build.build(instructions, compiler(), directory, cpu_build.torch_openmp()), instructions)


def emulated() -> Kernels:
    """The AVX512-VNNI kernels over SIMDe; skips if its headers are not installed."""
    command = compiler()
    probe = subprocess.run(
        [*command, "-E", "-x", "c++", "-"], input="#include <simde/x86/avx512.h>", capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip("emulating AVX512 needs SIMDe's headers: apt-get install libsimde-dev")
    native("avx2")
    with pytest.MonkeyPatch.context() as patch:
        # Without the compiler's AVX512 flags, which would bypass the emulation.
        patch.setitem(INSTRUCTION_SETS, "avx512_vnni", INSTRUCTION_SETS["avx2"])
        extra = ("-I", str(EMULATION), "-O1", "-w")
        built = cpu_build.build("avx512_vnni", command, cpu_build.cache_directory(), cpu_build.torch_openmp(), extra)
    return cpu_build.load(built, "avx512_vnni")
