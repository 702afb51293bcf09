"""The kernels of routed experts compiled ahead of time: what the binaries show."""

from dataclasses import replace

import pytest

from morphoquant_vllm.gpu import tiles

ahead = pytest.importorskip("morphoquant_vllm.gpu.tools.aot_experts", reason="needs triton")
experts = pytest.importorskip("morphoquant_vllm.gpu.experts", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_checks", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TABLE = tiles.load(tiles.DEFAULT_TABLE)
KINDS = [(32, False), (64, False), (128, False), (32, True)]


def architecture_of(target: str) -> tiles.Architecture:
    return TABLE["sm_89" if target in ("sm_86", "sm_120") else target]


def problems(target: str, tile: tiles.Tile, group_size: int, **variant: object) -> list[str]:
    """Those of the dense product, but for the programs of a multiprocessor, which gathers may lower by one or more."""
    used = resources.resources(ahead.build_experts(target, tile, group_size, **variant))
    found = proof.gemm_problems(used, architecture_of(target), tile)
    return [problem for problem in found if not problem.startswith("occupancy")]


@pytest.mark.parametrize(("target", "two_level"), [("sm_80", False), ("sm_90", True)])
def test_the_product_of_few_pairs(target: str, two_level: bool) -> None:
    assert problems(target, architecture_of(target).tile(1, 32, two_level), 32) == []


def test_a_tile_that_does_not_fit_is_seen() -> None:
    wide = TABLE["sm_80"].tile(10**6, 32, False)
    assert any(
        "registers" in problem or "memory" in problem for problem in problems("sm_80", replace(wide, stages=12), 32)
    )


def quantizer_problems(target: str, **variant: object) -> list[str]:
    """Spills; and fused float32 operations, but for AMD, whose division and exponential are made of them."""
    kernel = ahead.build_quantize_pairs(target, **variant)
    return proof.spill_problems(resources.resources(kernel)) + (
        [] if target == "gfx942" else proof.rounding_problems(kernel)
    )


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_quantizer_and_the_sum_stay_in_registers(target: str) -> None:
    assert quantizer_problems(target) == []
    assert proof.spill_problems(resources.resources(ahead.build_add_pairs(target))) == []


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("group_size", "two_level"), KINDS)
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_product_everywhere(target: str, group_size: int, two_level: bool, dtype: str) -> None:
    for tile in experts.tiles_of(architecture_of(target), group_size, two_level):
        for variant in ({}, {"even_k": False}, {"down": True}):
            assert problems(target, tile, group_size, dtype=dtype, **variant) == []


@pytest.mark.full
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_quantizer_and_sum_everywhere(target: str, in_order: bool) -> None:
    for dtype in ("bfloat16", "float16"):
        assert quantizer_problems(target, dtype=dtype, blocks=2, in_order=in_order) == []
        assert proof.spill_problems(resources.resources(ahead.build_add_pairs(target, dtype=dtype))) == []
