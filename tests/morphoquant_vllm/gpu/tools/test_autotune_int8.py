"""What `autotune` tries of the int8 path, and from how many tokens it lets it serve; times are given, not measured."""

import pytest

from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.tools import autotune_int8


@pytest.mark.parametrize("descriptors", [False, True])
def test_every_candidate_is_a_tile_that_the_table_takes(descriptors: bool) -> None:
    tried = list(autotune_int8.candidates(descriptors, fused=descriptors))
    assert len(tried) == len(set(tried)) >= 8
    for candidate in tried:
        candidate.check("candidate")
        assert candidate.fused or candidate.descriptors == descriptors
        assert candidate.min_tokens is None
    assert any(candidate.fused for candidate in tried) == descriptors


def test_the_path_serves_from_where_it_always_wins() -> None:
    starts = (256, 512, 1024)
    assert autotune_int8.first_tokens(starts, (3, 3, 3), (4, 4, 4)) == 256
    assert autotune_int8.first_tokens(starts, (3, 5, 3), (4, 4, 4)) == 1024, "512 is lost: 256 does not count"
    assert autotune_int8.first_tokens(starts, (3, 3, 4), (4, 4, 4)) is None


def test_the_fastest_tile_is_written_with_what_was_measured() -> None:
    slow, fast = list(autotune_int8.candidates(True, fused=False))[:2]

    def time(tile: tiles.Int8Tile, tokens: int) -> float:
        return (0.2 if tile == slow else 0.1) + tokens / 1e4

    found = autotune_int8.best([slow, fast], time, lambda tokens: tokens / 4e3, "a GPU")
    assert (found.block_k, found.stages) == (fast.block_k, fast.stages)
    # 0.1 + M / 10000 is less than M / 4000 from 667 on.
    assert found.min_tokens == 1024
    assert "measured on a GPU" in found.reason
    assert "M = 1024 202.4 us (the other path 256.0)" in found.reason
