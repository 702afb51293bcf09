"""The kernels of the int8 path compiled ahead of time: what the binaries show, and that each assertion can fail."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from morphoquant_vllm.gpu import tiles

ahead = pytest.importorskip("morphoquant_vllm.gpu.tools.aot_int8", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_checks", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TABLE = tiles.load(tiles.DEFAULT_TABLE)
# Compile targets, and the architecture whose tiles serve them.
TARGETS = {target: "sm_89" if target in ("sm_86", "sm_120") else target for target in ahead.TARGETS}
VARIANTS = {
    "bfloat16": {},
    "float16 with a bias": {"dtype": "float16", "has_bias": True},
    "a part of a block of K left": {"even_k": False},
}


def product_problems(target: str, **variant: object) -> list[str]:
    architecture = TABLE[TARGETS[target]]
    kernel = ahead.build_int8_gemm(target, architecture.int8, **variant)
    return proof.int8_problems(kernel, architecture, architecture.int8)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_unpacking_moves_16_bytes_at_a_time_through_registers(target: str) -> None:
    kernel = ahead.build_unpack(target)
    assert proof.unpack_problems(kernel) == []
    opcodes = resources.resources(kernel).instructions
    loads, stores = ("LDG.E.128", "STG.E.128") if target == "sm_90" else ("global_load_dwordx4", "global_store_dwordx4")
    # Of each of two tiles 16 bytes, which become twice 16.
    assert (opcodes.count(loads), opcodes.count(stores)) == (2, 4)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_product(target: str) -> None:
    assert product_problems(target) == []


def test_descriptors_copy_blocks_and_one_wait_ends_a_turn() -> None:
    """No thread computes an address or waits for a copy of its own."""
    kernel = ahead.build_int8_gemm("sm_90", TABLE["sm_90"].int8)
    used = resources.resources(kernel)
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"] and used.asynchronous_copies == 0
    assert kernel.metadata.global_scratch_size == 0, "the host makes the descriptors"
    assert sum(opcode.startswith("IGMMA") for opcode in used.loop) == 4
    assert used.waits == 1
    assert not any(opcode.startswith(("STS", "LDS.", "SHFL", "I2F")) for opcode in used.loop)


def test_bytes_do_not_move_within_registers_between_copy_and_product() -> None:
    """One product a turn made Triton 3.9 do that: 168 of 354 instructions of the loop, and 242 registers."""
    used = resources.resources(ahead.build_int8_gemm("sm_80", TABLE["sm_80"].int8))
    assert not any(opcode.startswith("PRMT") for opcode in used.loop)


FUSED = replace(
    TABLE["sm_90"].int8,
    block_m=256,
    stages=4,
    descriptors=False,
    fused=True,
    programs_per_unit=1,
    reason="not measured",
)


def fused_problems(tile: tiles.Int8Tile, **variant: object) -> list[str]:
    tile.check("test")
    return proof.int8_problems(ahead.build_int8_gemm("sm_90", tile, **variant), TABLE["sm_90"], tile)


def test_the_fused_kernel_unpacks_while_products_run() -> None:
    """Of two turns: all products of one are started, and then the wait is for those of the turn before."""
    assert fused_problems(FUSED) == []
    kernel = ahead.build_int8_gemm("sm_90", FUSED)
    assert len(re.findall(r"wgmma\.wait_group\S* 1;", kernel.asm["ptx"])) == 2
    loop = resources.resources(kernel).loop
    kinds = [opcode.split(".")[0] for opcode in loop if opcode.startswith(("IGMMA", "WARPGROUP.DEPBAR"))]
    products = ["IGMMA"] * 8
    assert kinds == [*products, "WARPGROUP", *products, "WARPGROUP"]
    # Weights are unpacked before products are started, and so while those of the turn before run: 16 words a turn.
    first = next(place for place, opcode in enumerate(loop) if opcode.startswith("IGMMA"))
    assert sum(opcode.startswith("LOP3") for opcode in loop[:first]) >= 32


def test_products_of_a_fused_kernel_that_run_one_by_one_are_seen() -> None:
    """As the assembler made them if the loop could be passed by: a wait after each. Shown by judging fewer allowed."""
    used = resources.resources(ahead.build_int8_gemm("sm_90", FUSED))
    assert used.waits == 2
    judged = replace(FUSED, fused=False, descriptors=True)
    found = proof.int8_problems(ahead.build_int8_gemm("sm_90", FUSED), TABLE["sm_90"], judged)
    assert "waits for matrix instructions in the loop: 2, over 1" in found


def test_a_fused_tile_of_six_stages_does_not_fit() -> None:
    found = "; ".join(fused_problems(replace(FUSED, stages=6)))
    assert "shared memory: 245760 bytes, the limit is 232448" in found


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("block_m", "stages"), [(128, 3), (128, 4), (256, 3), (256, 4)])
def test_every_fused_candidate(block_m: int, stages: int, variant: str) -> None:
    assert fused_problems(replace(FUSED, block_m=block_m, stages=stages), **VARIANTS[variant]) == []


def test_few_warps_unpack_through_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead.int8_path.UNPACK_WARPS, "nvidia", 4)
    assert proof.unpack_problems(ahead.build_unpack("sm_80")) == [
        "shared memory: 512 bytes, although nothing needs to move"
    ]


def test_many_warps_unpack_less_than_16_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead.int8_path.UNPACK_WARPS, "amd", 8)
    found = "; ".join(proof.unpack_problems(ahead.build_unpack("gfx942")))
    assert "loads: global_load_dword, global_load_dwordx2, not of 16 bytes" in found
    assert "stores: global_store_dwordx2, not of 16 bytes" in found


def test_a_product_that_does_not_fit_is_seen() -> None:
    architecture = TABLE["sm_90"]
    deep = replace(architecture.int8, stages=8)
    found = "; ".join(proof.int8_problems(ahead.build_int8_gemm("sm_90", deep), architecture, deep))
    assert "shared memory: 262208 bytes, the limit is 232448" in found
    assert "occupancy: 0 programs fit, the tile needs 2" in found


def test_copies_that_are_not_made_through_descriptors_are_seen() -> None:
    """By judging the product of pointers as if it had descriptors, and the other way round."""
    architecture = TABLE["sm_90"]
    plain = replace(architecture.int8, descriptors=False)
    kernels = ahead.build_int8_gemm("sm_90", plain), ahead.build_int8_gemm("sm_90", architecture.int8)
    assert proof.int8_problems(kernels[0], architecture, plain) == []
    assert proof.int8_problems(kernels[0], architecture, architecture.int8) == [
        "bulk copies: 0, fewer than 6",
        "waits for matrix instructions in the loop: 2, over 1",
    ]
    assert proof.int8_problems(kernels[1], architecture, plain) == ["asynchronous copies: 0, fewer than 12"]


def test_levels_of_several_rows_are_seen() -> None:
    """By what the check reads: the operands of the instruction."""
    kernel = ahead.build_unpack("sm_90")
    first = next(line for line in kernel.asm["llir"].splitlines() if "mad.lo.u32" in line)
    level = first[first.index("(<4 x i8>") :].split(", ")[1]
    mixed = first.replace(f"{level}, {level}, {level}, {level},", f"{level}, {level}, {level}, i32 %other,")
    assert mixed != first
    changed = SimpleNamespace(asm={"llir": kernel.asm["llir"].replace(first, mixed)})
    assert "1 of 16 products mix rows" in proof.level_problems(changed)[0]


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_unpacking_everywhere(target: str) -> None:
    assert proof.unpack_problems(ahead.build_unpack(target)) == []


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_product_everywhere(target: str, variant: str) -> None:
    assert product_problems(target, **VARIANTS[variant]) == []
