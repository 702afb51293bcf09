"""The kernels compiled ahead of time, without a GPU: what the binaries show, for every architecture of the tile table.

They prove no speed. That each assertion can fail is in test_aot_bad_tiles.py.
"""

import itertools
import re

import pytest

from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.tiles import Tile

ahead = pytest.importorskip("morphoquant_vllm.gpu.tools.aot_compile", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_checks", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TABLE = tiles.load(tiles.DEFAULT_TABLE)
# Compile targets of an architecture's devices.
TARGETS = {"sm_89": ("sm_86", "sm_89", "sm_120")}
# A float32 output is never split; a partial sum is always float32.
VARIANTS = {
    "bfloat16": {},
    "float16 with a bias": {"dtype": "float16", "has_bias": True},
    "partial sums": {"partial": True},
    "half a tile of K left": {"even_k": False},
}


def gemm_problems(name: str, tile: Tile, group_size: int, target: str | None = None, **variant: object) -> list[str]:
    architecture = TABLE[name]
    kernel = ahead.build_gemm(target or name, tile, group_size, **variant)
    problems = proof.gemm_problems(resources.resources(kernel), architecture, tile)
    if tile.two_level and architecture.vendor == "nvidia":
        problems += proof.level_problems(kernel)
    return problems


def tiles_of(name: str, two_level: bool = False) -> list[Tile]:
    return [tile for tile in TABLE[name].tiles if tile.two_level == two_level]


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_decode_kernel(name: str) -> None:
    assert gemm_problems(name, tiles_of(name)[0], 32, partial=True) == []


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_prefill_kernel(name: str) -> None:
    assert gemm_problems(name, tiles_of(name)[-1], 128) == []


@pytest.mark.parametrize(("name", "index"), [("sm_80", 0), ("sm_90", -1), ("gfx942", -1)])
def test_the_kernel_of_two_level_scales(name: str, index: int) -> None:
    assert gemm_problems(name, tiles_of(name, two_level=True)[index], 32, partial=index == 0) == []


def test_two_level_scales_need_no_conversion_in_the_loop() -> None:
    """What they are for: no sum becomes a float there."""
    loops = []
    for two_level in (False, True):
        tile = TABLE["sm_90"].tile(2048, 32, two_level)
        used = resources.resources(ahead.build_gemm("sm_90", tile, 32))
        loops.append(sum(opcode.startswith(("I2F", "FFMA")) for opcode in used.loop))
    assert loops == [2 * 128, 0]


@pytest.mark.parametrize("two_level", [False, True])
def test_joined_operands_wait_once_a_turn(two_level: bool) -> None:
    """What they are for: four products of 128 channels and one wait in the loop, and nothing moves for it."""
    used = resources.resources(ahead.build_gemm("sm_90", TABLE["sm_90"].tile(2048, 128, two_level), 128))
    assert sum(opcode.startswith("IGMMA") for opcode in used.loop) == 4
    assert used.waits == 1
    assert not any(opcode.startswith(("STS", "SHFL")) for opcode in used.loop)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_activation_quantizer(target: str) -> None:
    kernel = ahead.build_quantize(target)
    assert proof.spill_problems(resources.resources(kernel)) == []
    assert proof.rounding_problems(kernel) == []


@pytest.mark.parametrize(
    ("target", "width", "silu_mul"), [("sm_90", 4096, True), ("sm_89", 32768, False), ("gfx942", 4096, False)]
)
def test_the_quantizer_of_whole_tokens(target: str, width: int, silu_mul: bool) -> None:
    kernel = ahead.build_quantize(target, width=width, silu_mul=silu_mul)
    used = resources.resources(kernel)
    assert proof.spill_problems(used) == []
    assert proof.rounding_problems(kernel) == []
    assert used.shared_memory == 2 * width, "the tokens' values, once, in 16 bit"


@pytest.mark.parametrize(("target", "silu_mul"), [("sm_80", True), ("sm_90", False), ("gfx942", False)])
def test_the_quantizer_of_channels_in_order(target: str, silu_mul: bool) -> None:
    few = ahead.build_quantize(target, in_order=True, silu_mul=silu_mul)
    assert proof.spill_problems(resources.resources(few)) == []
    kernel = ahead.build_quantize(target, many=True, silu_mul=silu_mul)
    assert proof.spill_problems(resources.resources(kernel)) == []
    assert proof.rounding_problems(kernel) == []
    if target != "gfx942":
        # Tokens and tables 16 bytes at a time, nothing through shared memory; the rest is the massive intervals'.
        assert len(re.findall(r"ld\.global\.v4\.b32", kernel.asm["ptx"])) == 5 + silu_mul
        assert kernel.asm["ttgir"].count("ttg.convert_layout") <= 1


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_activation_quantizer_with_silu_and_mul(target: str) -> None:
    kernel = ahead.build_quantize(target, silu_mul=True)
    assert proof.spill_problems(resources.resources(kernel)) == []
    # AMD's division and exponential are made of fused operations themselves.
    assert target == "gfx942" or proof.rounding_problems(kernel) == []


@pytest.mark.parametrize(("target", "many"), [("sm_80", True), ("sm_90", False), ("gfx942", False)])
def test_the_kernel_that_norms_and_quantizes(target: str, many: bool) -> None:
    kernel = ahead.build_norm_quantize(target, 4096, many=many)
    used = resources.resources(kernel)
    assert proof.spill_problems(used) == []
    assert used.shared_memory == 2 * 4096, "the norm's values, once, in 16 bit"
    if target != "gfx942":
        # AMD's division and root are made of fused operations themselves.
        assert proof.rounding_problems(kernel) == []
        # x, residual, the norm's weight, order and tables, of one row or of two, 16 bytes at a time.
        assert len(re.findall(r"ld\.global\.v4\.b32", kernel.asm["ptx"])) == (9 if many else 13)


def test_the_reduction() -> None:
    for two_level in (False, True):
        assert proof.spill_problems(resources.resources(ahead.build_reduce("sm_90", two_level=two_level))) == []


def adding_problems(name: str, tile: Tile, group_size: int, target: str, **variant: object) -> list[str]:
    kernel = ahead.build_gemm_adding(target, tile, group_size, **variant)
    return proof.gemm_problems(resources.resources(kernel), TABLE[name], tile) + proof.counter_problems(kernel)


@pytest.mark.parametrize(("name", "two_level"), [("sm_80", False), ("sm_90", True)])
def test_the_kernel_that_adds_the_parts_itself(name: str, two_level: bool) -> None:
    assert adding_problems(name, tiles_of(name, two_level)[0], 32, name) == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "target", "index"),
    [
        (name, target, index)
        for name, architecture in TABLE.items()
        for target in TARGETS.get(name, (name,))
        for index, tile in enumerate(architecture.tiles)
        # Of many tokens K is seldom split, and the sums of two tiles would not fit the registers.
        if tile.max_splits > 1 and tile.block_m <= tiles.ADDING_BLOCK_M and architecture.vendor == "nvidia"
    ],
)
def test_every_tile_of_few_tokens_may_add_its_parts(name: str, target: str, index: int) -> None:
    tile = TABLE[name].tiles[index]
    for dtype, has_bias in (("bfloat16", False), ("float16", True)):
        assert adding_problems(name, tile, tile.group_sizes[0], target, dtype=dtype, has_bias=has_bias) == []


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("name", "target", "index"),
    [
        (name, target, index)
        for name, architecture in TABLE.items()
        for target in TARGETS.get(name, (name,))
        for index in range(len(architecture.tiles))
    ],
)
def test_every_tile_of_the_table(name: str, target: str, index: int, group_size: int, variant: str) -> None:
    tile = TABLE[name].tiles[index]
    if not tile.serves(group_size, tile.two_level):
        pytest.skip("the tile is for other group sizes")
    if tile.two_level and group_size > 32:
        pytest.skip("kernels of two-level scales do not depend on the group size")
    if variant == "half a tile of K left" and group_size > 32:
        pytest.skip("only groups of 32 leave half a tile")
    assert gemm_problems(name, tile, group_size, target, **VARIANTS[variant]) == []


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", sorted(ahead.TARGETS))
def test_the_small_kernels_everywhere(target: str, dtype: str) -> None:
    for blocks in (1, 4):
        kernel = ahead.build_quantize(target, dtype=dtype, blocks=blocks)
        assert proof.spill_problems(resources.resources(kernel)) == []
        for many in (False, True):
            in_order = ahead.build_quantize(target, dtype=dtype, blocks=blocks, in_order=True, many=many)
            assert proof.spill_problems(resources.resources(in_order)) == []
            assert proof.rounding_problems(in_order) == []
        with_silu = ahead.build_quantize(target, dtype=dtype, blocks=blocks, silu_mul=True)
        assert proof.spill_problems(resources.resources(with_silu)) == []
        assert proof.rounding_problems(kernel) == []
    for width, add, many, in_order in itertools.product((512, 4096, 8192, 16384), *[(False, True)] * 3):
        kernel = ahead.build_norm_quantize(target, width, dtype=dtype, add=add, many=many, in_order=in_order)
        assert proof.spill_problems(resources.resources(kernel)) == [], (width, add, many, in_order)
        assert target == "gfx942" or proof.rounding_problems(kernel) == []
    for has_bias, two_level in itertools.product((False, True), repeat=2):
        used = resources.resources(ahead.build_reduce(target, dtype=dtype, has_bias=has_bias, two_level=two_level))
        assert proof.spill_problems(used) == []
