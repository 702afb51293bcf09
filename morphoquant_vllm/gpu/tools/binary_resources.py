"""Resources of a compiled kernel, read from the binary and not from the compiler's report."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

# SASS of an integer matrix instruction: mma.sync, wgmma and tcgen05 in turn.
MATRIX_SASS = re.compile(r"\b(IMMA|IGMMA|UTCIMMA|UTCQMMA)\b")
# "/*0010*/  @!P0 LDG.E.128 R4, ... ;": the address, perhaps a predicate, the opcode, its operands.
SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
MATRIX_SOURCE = re.compile(r"\b(mma\.sync[\w.:]*|wgmma\.mma_async[\w.:]*|tcgen05\.mma[\w.:]*|v_mfma_\w+)")


@dataclass(frozen=True)
class Resources:
    """Registers and shared memory of one program, and figures of its instructions."""

    registers: int  # per thread
    stack: int  # bytes per thread; on AMD scratch memory
    local_accesses: int  # LDL and STL in the SASS, on AMD spilled registers
    shared_memory: int  # bytes
    threads: int
    # Matrix instructions as they are called in PTX or AMD's assembly.
    matrix: frozenset[str]
    asynchronous_copies: int  # cp.async of 16 bytes or less, in the PTX
    waits: int  # for matrix instructions of warp groups, in the loop below
    layout_conversions: int  # convert_layout in loops of Triton's GPU IR: passes through shared memory, turn by turn
    instructions: tuple[str, ...]  # opcodes of the binary, in order
    loop: tuple[str, ...]  # opcodes of the innermost loop that holds matrix instructions; empty if none, and on AMD


@cache
def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([_tool("cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout


def resources(kernel: CompiledKernel) -> Resources:
    """Read the resources of `kernel`: NVIDIA cubins through cuobjdump, AMD binaries from their metadata."""
    return _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)


def _loop_conversions(text: str) -> int:
    """Lines with convert_layout between a `scf.for` and the brace that ends it."""
    count = 0
    ends: list[int] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if ends and line.lstrip().startswith("}") and indent == ends[-1]:
            ends.pop()
        count += bool(ends) and "ttg.convert_layout" in line
        if "scf.for" in line and line.rstrip().endswith("{"):
            ends.append(indent)
    return count


def _nvidia(kernel: CompiledKernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counts is None:
        raise ValueError(f"cuobjdump names no registers: {usage[:200]!r}")
    ptx = kernel.asm["ptx"]
    lines = SASS_LINE.findall(sass)
    opcodes = tuple(opcode for _, opcode, _ in lines)
    loop = _matrix_loop([(int(address, 16), opcode, operands) for address, opcode, operands in lines])
    return Resources(
        registers=int(counts[1]),
        stack=int(counts[2]),
        local_accesses=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        shared_memory=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 32,
        matrix=frozenset(MATRIX_SOURCE.findall(ptx)),
        asynchronous_copies=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        waits=sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in loop),
        layout_conversions=_loop_conversions(kernel.asm["ttgir"]),
        instructions=opcodes,
        loop=loop,
    )


def _matrix_loop(lines: list[tuple[int, str, str]]) -> tuple[str, ...]:
    """Opcodes between a branch back and its target: the shortest such span with the most matrix instructions."""
    spans = []
    for address, opcode, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            span = tuple(name for place, name, _ in lines if int(target[1], 16) <= place <= address)
            spans.append((sum(bool(MATRIX_SASS.match(name)) for name in span), -len(span), span))
    best = max(spans, default=(0, 0, ()))
    return best[2] if best[0] else ()


def _amd(kernel: CompiledKernel) -> Resources:
    assembly = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if found is None:
            raise ValueError(f"AMD's assembly has no {pattern}")
        return int(found[1])

    return Resources(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        stack=number(r"\.private_segment_fixed_size:\s+(\d+)"),
        local_accesses=number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)"),
        shared_memory=kernel.metadata.shared,
        threads=kernel.metadata.num_warps * 64,
        matrix=frozenset(MATRIX_SOURCE.findall(assembly)),
        asynchronous_copies=len(re.findall(r"global_load_lds|buffer_load_\w+ .*\blds\b", assembly)),
        waits=0,
        layout_conversions=_loop_conversions(kernel.asm["ttgir"]),
        instructions=tuple(re.findall(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+)", assembly, re.MULTILINE)),
        loop=(),
    )
