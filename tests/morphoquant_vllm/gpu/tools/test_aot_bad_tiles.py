"""Each assertion on compiled kernels fails on a configuration made to break it, and says why."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.tiles import Tile

ahead = pytest.importorskip("morphoquant_vllm.gpu.tools.aot_compile", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_checks", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TABLE = tiles.load(tiles.DEFAULT_TABLE)


def problems(name: str, group_size: int, *, aligned: bool = True, index: int = 0, **changes: int) -> str:
    """What is wrong with a tile of the table, for group scales unless `changes` say otherwise, after them."""
    architecture = TABLE[name]
    group_tiles = [tile for tile in architecture.tiles if not tile.two_level]
    tile: Tile = replace(group_tiles[index], **changes)
    used = resources.resources(ahead.build_gemm(name, tile, group_size, aligned=aligned))
    return "; ".join(proof.gemm_problems(used, architecture, tile))


def test_rows_of_256_tokens_spill() -> None:
    found = problems("sm_80", 128, index=-1, block_m=256)
    assert "stack: " in found
    assert "local memory: " in found


def test_eight_stages_exceed_the_shared_memory() -> None:
    assert "shared memory: 175616 bytes, the limit is 101376" in problems("sm_89", 128, index=-1, stages=8)


def test_four_stages_leave_no_room_for_the_programs() -> None:
    assert "occupancy: 2 programs fit, the tile needs 3" in problems("sm_89", 128, index=2, stages=4)


def test_eight_tokens_find_no_matrix_instruction_on_amd() -> None:
    assert "matrix instruction: []" in problems("gfx942", 64, block_m=8)


def test_a_narrow_tile_is_not_compiled_to_wgmma() -> None:
    """The instruction is judged by the tile: shown by judging a narrow tile's binary as a wide one."""
    architecture = TABLE["sm_90"]
    wide = architecture.tiles[0]
    used = resources.resources(ahead.build_gemm("sm_90", replace(wide, block_n=32), 64))
    assert "matrix instruction: ['mma.sync" in "; ".join(proof.gemm_problems(used, architecture, wide))


def test_unaligned_pointers_are_copied_synchronously() -> None:
    """All but the scales, of which each thread reads whole words."""
    assert "asynchronous copies: 8, fewer than 24" in problems("sm_80", 64, aligned=False)


def test_four_warps_on_128_outputs_convert_layouts_in_the_loop() -> None:
    assert "layout conversions in the loop: 2, over 0" in problems("sm_80", 32, block_n=128)


def test_fused_operations_are_seen() -> None:
    assert "rounding: fma" in "; ".join(proof.rounding_problems(ahead.build_reduce("sm_80")))


def test_two_level_scales_without_their_own_tiles() -> None:
    """Two turns an iteration leave a remainder, whose levels change layout; its weights are not copied ahead."""
    assert "layout conversions in the loop: 1" in problems("sm_80", 32, two_level=True, unroll=2)


def test_operands_that_are_not_joined_wait_more_often() -> None:
    """The waits are counted in the binary: shown by judging one as if its operands were joined."""
    architecture = TABLE["sm_90"]
    joined = next(tile for tile in architecture.tiles[::-1] if tile.two_level)
    assert joined.joined
    used = resources.resources(ahead.build_gemm("sm_90", replace(joined, joined=False), 32))
    assert proof.gemm_problems(used, architecture, replace(joined, joined=False)) == []
    assert proof.gemm_problems(used, architecture, joined) == ["waits for matrix instructions in the loop: 4, over 1"]


def test_joined_operands_leave_no_room_for_two_programs_on_sm_80() -> None:
    """Why the table joins them on sm_90 alone."""
    architecture = TABLE["sm_80"]
    tile = architecture.tile(2048, 32, two_level=True)
    joined = replace(tile, joined=True)
    for tried, fits in ((tile, True), (joined, False)):
        used = resources.resources(ahead.build_gemm("sm_80", tried, 32))
        assert (proof.gemm_problems(used, architecture, tried) == []) == fits
    assert "occupancy: 1 programs fit, the tile needs 2" in proof.gemm_problems(used, architecture, joined)[0]


def test_levels_of_several_rows_are_seen() -> None:
    """By what the check reads: the operands of the instruction."""
    tile = next(tile for tile in TABLE["sm_80"].tiles if tile.two_level)
    kernel = ahead.build_gemm("sm_80", tile, 32)
    assert proof.level_problems(kernel) == []
    first = next(line for line in kernel.asm["llir"].splitlines() if "mad.lo.u32" in line)
    level = first[first.index("(<4 x i8>") :].split(", ")[1]
    mixed = first.replace(f"{level}, {level}, {level}, {level},", f"{level}, {level}, {level}, i32 %other,")
    assert mixed != first
    changed = SimpleNamespace(asm={"llir": kernel.asm["llir"].replace(first, mixed)})
    assert "1 of " in "; ".join(proof.level_problems(changed)) and "mix rows" in proof.level_problems(changed)[0]
    grouped = ahead.build_gemm("sm_80", TABLE["sm_80"].tiles[0], 32)
    assert proof.level_problems(grouped) == ["levels: nothing multiplies weights by them"]


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("acq_rel", "relaxed", "0 atomic additions of device scope"),
        ("bar.sync", "nop", "no barrier between the sums and it"),
    ],
)
def test_a_counter_that_orders_nothing_is_seen(before: str, after: str, problem: str) -> None:
    tile = next(tile for tile in TABLE["sm_80"].tiles if not tile.two_level)
    kernel = ahead.build_gemm_adding("sm_80", tile, 32)
    assert proof.counter_problems(kernel) == []
    changed = SimpleNamespace(asm={"ptx": kernel.asm["ptx"].replace(before, after)})
    assert problem in "; ".join(proof.counter_problems(changed))


def test_amd_s_barrier_does_not_wait_for_the_sums_of_other_waves() -> None:
    """Why the kernel that adds the parts itself is not for AMD."""
    tile = next(tile for tile in TABLE["gfx942"].tiles if not tile.two_level)
    problems = proof.counter_problems(ahead.build_gemm_adding("gfx942", tile, 32))
    assert problems == ["counter: waves come to the barrier before their sums are written"]
