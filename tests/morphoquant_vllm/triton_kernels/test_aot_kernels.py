"""The kernels compiled ahead of time, without a GPU: what the binaries show, for every architecture of the tile table.

They prove no speed. That each assertion can fail is in test_aot_bad_tiles.py.
"""

import pytest

from morphoquant_vllm.triton_kernels import tiles

ahead = pytest.importorskip("morphoquant_vllm.triton_kernels.ahead", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.triton_kernels.proof", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.triton_kernels.resources", reason="needs triton")

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


def gemm_problems(name: str, index: int, group_size: int, target: str | None = None, **variant: object) -> list[str]:
    architecture = TABLE[name]
    tile = architecture.tiles[index]
    used = resources.resources(ahead.build_gemm(target or name, tile, group_size, **variant))
    return proof.gemm_problems(used, architecture, tile)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_decode_kernel(name: str) -> None:
    assert gemm_problems(name, 0, 32, partial=True) == []


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_prefill_kernel(name: str) -> None:
    assert gemm_problems(name, -1, 128) == []


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_activation_quantizer(target: str) -> None:
    kernel = ahead.build_quantize(target)
    assert proof.spill_problems(resources.resources(kernel)) == []
    assert proof.rounding_problems(kernel) == []


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_activation_quantizer_with_silu_and_mul(target: str) -> None:
    kernel = ahead.build_quantize(target, silu_mul=True)
    assert proof.spill_problems(resources.resources(kernel)) == []
    # AMD's division and exponential are made of fused operations themselves.
    assert target == "gfx942" or proof.rounding_problems(kernel) == []


def test_the_reduction() -> None:
    assert proof.spill_problems(resources.resources(ahead.build_reduce("sm_90"))) == []


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
    if variant == "half a tile of K left" and group_size > 32:
        pytest.skip("only groups of 32 leave half a tile")
    assert gemm_problems(name, index, group_size, target, **VARIANTS[variant]) == []


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", sorted(ahead.TARGETS))
def test_the_small_kernels_everywhere(target: str, dtype: str) -> None:
    for blocks in (1, 4):
        kernel = ahead.build_quantize(target, dtype=dtype, blocks=blocks)
        assert proof.spill_problems(resources.resources(kernel)) == []
        with_silu = ahead.build_quantize(target, dtype=dtype, blocks=blocks, silu_mul=True)
        assert proof.spill_problems(resources.resources(with_silu)) == []
        assert proof.rounding_problems(kernel) == []
    for has_bias in (False, True):
        used = resources.resources(ahead.build_reduce(target, dtype=dtype, has_bias=has_bias))
        assert proof.spill_problems(used) == []
