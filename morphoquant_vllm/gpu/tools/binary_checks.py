"""Conditions that a compiled kernel meets before it is shipped, read from the binary. They claim no speed."""

from __future__ import annotations

import re

from triton.compiler import CompiledKernel

from morphoquant_vllm.gpu.tiles import Architecture, Int8Tile, Tile
from morphoquant_vllm.gpu.tools.binary_resources import Resources, resources
from morphoquant_vllm.gpu.tools.occupancy import programs_per_unit

# If accumulators lie in tensor memory, scales need another layout each turn. Nothing else in a loop may.
TENSOR_MEMORY = "tcgen05"
# Output channels and warps from which Triton uses the matrix instructions of warp groups and of tensor memory.
WIDE_BLOCK_N, WIDE_WARPS = 64, 4
SYNCHRONOUS = re.compile(r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32")
WIDE = {
    "sm_90": re.compile(r"wgmma\.mma_async\S*k32\.s32\.s8\.s8"),
    "sm_100": re.compile(r"tcgen05\.mma\S*kind::i8"),
}
# Copies through a tensor descriptor.
BULK_COPY = re.compile(r"cp\.async\.bulk\.tensor")
# Loads and stores of 16 bytes.
WIDE_ACCESS = re.compile(r"\.128|dwordx4")
# Not 4x4x4: a sixteenth of the unit's throughput.
AMD = re.compile(r"v_mfma_i32_(16x16x32|32x32x16)_i8")


def matrix_instruction(architecture: Architecture, tile: Tile | Int8Tile) -> re.Pattern[str]:
    """The int8 matrix instruction that a tile must be compiled to."""
    if architecture.vendor == "amd":
        return AMD
    wide = tile.block_n >= WIDE_BLOCK_N and tile.warps >= WIDE_WARPS
    return WIDE.get(architecture.name, SYNCHRONOUS) if wide else SYNCHRONOUS


def spill_problems(used: Resources) -> list[str]:
    """Problems of values that leave the registers for memory."""
    problems = []
    if used.stack:
        problems.append(f"stack: {used.stack} bytes per thread")
    if used.local_accesses:
        problems.append(f"local memory: {used.local_accesses} loads and stores")
    return problems


def _program_problems(used: Resources, architecture: Architecture, tile: Tile | Int8Tile) -> list[str]:
    """Problems of spills, of a program's share of its multiprocessor, and of the matrix instruction."""
    problems = spill_problems(used)
    if used.shared_memory > architecture.shared_memory:
        problems.append(f"shared memory: {used.shared_memory} bytes, the limit is {architecture.shared_memory}")
    fitting = programs_per_unit(used, architecture)
    if fitting < tile.programs_per_unit:
        problems.append(
            f"occupancy: {fitting} programs fit, the tile needs {tile.programs_per_unit} "
            f"({used.registers} registers, {used.shared_memory} bytes)"
        )
    wanted = matrix_instruction(architecture, tile)
    if len(used.matrix) != 1 or not wanted.fullmatch(next(iter(used.matrix))):
        problems.append(f"matrix instruction: {sorted(used.matrix)}, not {wanted.pattern}")
    return problems


def gemm_problems(used: Resources, architecture: Architecture, tile: Tile) -> list[str]:
    """All problems of the matrix kernel compiled for `tile`; empty if it may be shipped."""
    problems = _program_problems(used, architecture, tile)
    # Each step in flight has at least one copy for weights and one for each half of the codes. With two-level scales a
    # turn has two steps, and one copy for their levels. Codes of joined operands are one copy.
    copies = (7 - 3 * tile.joined if tile.two_level else 3 - tile.joined) * tile.stages * tile.unroll
    if architecture.vendor == "nvidia" and used.asynchronous_copies < copies:
        problems.append(f"asynchronous copies: {used.asynchronous_copies}, fewer than {copies}")
    products = (1 if tile.joined else 4 if tile.two_level else 2) * tile.unroll
    if used.waits > products:
        problems.append(f"waits for matrix instructions in the loop: {used.waits}, over {products}")
    conversions = any(name.startswith(TENSOR_MEMORY) for name in used.matrix)
    if used.layout_conversions > conversions:
        problems.append(f"layout conversions in the loop: {used.layout_conversions}, over {int(conversions)}")
    return problems


def int8_problems(kernel: CompiledKernel, architecture: Architecture, tile: Int8Tile) -> list[str]:
    """All problems of the int8 path's product compiled for `tile`; empty if it may be shipped."""
    used = resources(kernel)
    problems = _program_problems(used, architecture, tile)
    if tile.fused:
        # Codes and two tiles of weights for all turns in flight but one, and for both turns of the loop.
        kind, found = "asynchronous copies", used.asynchronous_copies
        wanted = (tile.block_m // 32 + 2) * tile.stages
        problems += level_problems(kernel)
    elif tile.descriptors:
        # One copy of either operand for every turn in flight.
        kind, found, wanted = "bulk copies", len(BULK_COPY.findall(kernel.asm["ptx"])), 2 * tile.stages
    else:
        # With pointers, one copy of either operand for each half of a turn.
        kind, found, wanted = "asynchronous copies", used.asynchronous_copies, 4 * tile.stages
    if architecture.vendor == "nvidia" and found < wanted:
        problems.append(f"{kind}: {found}, fewer than {wanted}")
    # In a fused kernel the assembler adds more waits if products cannot overlap.
    products = 1 if tile.descriptors else 2
    if used.waits > products:
        problems.append(f"waits for matrix instructions in the loop: {used.waits}, over {products}")
    # Gluon's layout conversions move nothing: any other would not compile.
    if used.layout_conversions and not tile.fused:
        problems.append(f"layout conversions in the loop: {used.layout_conversions}, over 0")
    return problems


def unpack_problems(kernel: CompiledKernel) -> list[str]:
    """All problems of the kernel that unpacks into int8: it must move 16 bytes at a time, by registers alone."""
    used = resources(kernel)
    problems = spill_problems(used)
    if used.shared_memory or "ttg.convert_layout" in kernel.asm["ttgir"]:
        problems.append(f"shared memory: {used.shared_memory} bytes, although nothing needs to move")
    if "ptx" in kernel.asm:
        problems += level_problems(kernel)
    loads, stores = (
        sorted({opcode for opcode in used.instructions if re.match(pattern, opcode)})
        for pattern in (r"LDG|(global|buffer)_load", r"STG|(global|buffer)_store")
    )
    # Levels are words.
    if not any(WIDE_ACCESS.search(opcode) for opcode in loads) or len(loads) > 2:
        problems.append(f"loads: {', '.join(loads)}, not of 16 bytes")
    if not stores or not all(WIDE_ACCESS.search(opcode) for opcode in stores):
        problems.append(f"stores: {', '.join(stores)}, not of 16 bytes")
    return problems


def level_problems(kernel: CompiledKernel) -> list[str]:
    """Problems of NVIDIA instructions that multiply four weights by one level: all four must have that level.

    They have it if a thread's bytes lie four in a row along K, which depends on the layouts that Triton chooses.
    """
    calls = re.findall(r"asm \"[^\"]*mad\.lo\.u32[^\"]*\", \"[^\"]*\"\(([^)]*)\)", kernel.asm["llir"])
    operands = [[operand.split()[-1] for operand in call.split(", ")][-8:] for call in calls]
    if not operands:
        return ["levels: nothing multiplies weights by them"]
    mixed = sum(len(set(one[:4])) + len(set(one[4:])) != 2 for one in operands)
    return [f"levels: {mixed} of {len(operands)} products mix rows"] if mixed else []


def rounding_problems(kernel: CompiledKernel) -> list[str]:
    """Problems of float32 operations that are fused or flush small numbers: codes would differ from the reference."""
    assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    found = sorted(set(re.findall(r"\bfma\.\S+|\bv_\w*(?:fma|mac)_f32\w*|\S+\.ftz\S*", assembly)))
    return [f"rounding: {', '.join(found)}"] if found else []


# Instructions that count a counter up, the barrier of a program, and stores.
COUNTING = {"nvidia": "atom.global.gpu.acq_rel.add.u32", "amd": "global_atomic_add"}
BARRIER = {"nvidia": "bar.sync", "amd": "s_barrier"}
STORE = {"nvidia": "st.global", "amd": "global_store"}
# An AMD barrier does not wait for stores to memory: each wave has to wait before it.
AMD_WAIT = "s_waitcnt vmcnt(0)"


def counter_problems(kernel: CompiledKernel) -> list[str]:
    """Problems of the counter: all sums of a program's threads must be written before the program counts itself."""
    vendor = "amd" if "amdgcn" in kernel.asm else "nvidia"
    lines = kernel.asm["amdgcn" if vendor == "amd" else "ptx"].splitlines()

    def places(instruction: str) -> list[int]:
        return [index for index, line in enumerate(lines) if instruction in line]

    counting = places(COUNTING[vendor])
    if len(counting) != 1:
        return [f"counter: {len(counting)} atomic additions of device scope, not one"]
    last_store = max((place for place in places(STORE[vendor]) if place < counting[0]), default=len(lines))
    barriers = [place for place in places(BARRIER[vendor]) if last_store < place < counting[0]]
    if not barriers:
        return ["counter: no barrier between the sums and it"]
    if vendor == "amd" and not any(last_store < place < barriers[0] for place in places(AMD_WAIT)):
        return ["counter: waves come to the barrier before their sums are written"]
    return []
