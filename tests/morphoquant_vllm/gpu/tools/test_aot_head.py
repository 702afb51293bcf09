"""The 8-bit head compiled ahead of time: what the binaries show."""

import re

import pytest

from morphoquant_vllm.gpu import head, tiles

ahead = pytest.importorskip("morphoquant_vllm.gpu.tools.aot_int8", reason="needs triton")
proof = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_checks", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TABLE = tiles.load(tiles.DEFAULT_TABLE)
# A matrix instruction of 16-bit floats with float32 sums.
MATRIX = {
    "bfloat16": re.compile(r"(mma\.sync|wgmma)\S*\.f32\.bf16\.bf16\S*|tcgen05\.mma\S*kind::f16|v_mfma_f32_\S*bf16\S*"),
    "float16": re.compile(r"(mma\.sync|wgmma)\S*\.f32\.f16\.f16\S*|tcgen05\.mma\S*kind::f16|v_mfma_f32_\S*f16\S*"),
}


def problems(target: str, tile: head.HeadTile, **variant: object) -> list[str]:
    """Spills, too much shared memory, or another matrix instruction."""
    used = resources.resources(ahead.build_head(target, tile, **variant))
    found = proof.spill_problems(used)
    architecture = TABLE["sm_89" if target in ("sm_86", "sm_120") else target]
    if used.shared_memory > architecture.shared_memory:
        found.append(f"shared memory: {used.shared_memory} bytes")
    wanted = MATRIX[str(variant.get("dtype", "bfloat16"))]
    if not used.matrix or not all(wanted.fullmatch(name) for name in used.matrix):
        found.append(f"matrix instruction: {sorted(used.matrix)}")
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_few_tokens(target: str) -> None:
    tile = head.TILES[0]
    assert problems(target, tile) == []
    used = resources.resources(ahead.build_head(target, tile))
    # Each turn in flight copies 64 x 128 bytes of codes, 16 bytes a thread at a time.
    assert used.asynchronous_copies >= 4 * (tile.stages - 1)
    # At most half of the shared memory: two programs or more run side by side, so that copies are always under way.
    assert 2 * used.shared_memory <= TABLE[target].shared_memory


def test_a_tile_that_does_not_fit_is_seen() -> None:
    deep = head.HeadTile(64, 64, 128, 4, 16)
    assert any(problem.startswith("shared memory") for problem in problems("sm_80", deep))


@pytest.mark.full
@pytest.mark.parametrize("dtype", MATRIX)
@pytest.mark.parametrize("even_k", [True, False])
@pytest.mark.parametrize("tile", head.TILES, ids=lambda tile: str(tile.block_m))
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_everywhere(target: str, tile: head.HeadTile, even_k: bool, dtype: str) -> None:
    assert problems(target, tile, dtype=dtype, even_k=even_k) == []
