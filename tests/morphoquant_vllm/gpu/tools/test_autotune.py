"""The autotune command, as far as it goes without a GPU: its candidates, its table, its refusal."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.gpu import tiles
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.tools import autotune


@pytest.mark.parametrize("two_level", [False, True])
def test_every_candidate_is_a_tile_that_the_table_takes(two_level: bool) -> None:
    for tokens in autotune.RANGES:
        tried = list(autotune.candidates(tokens, 64, two_level))
        assert len(tried) == len(set(tried)) >= 8
        for candidate in tried:
            candidate.check("candidate")
            assert candidate.max_tokens == tokens
            assert candidate.serves(64, two_level)
            assert candidate.serves(128, two_level) == two_level
        assert any(candidate.joined for candidate in tried) == (tokens is None or tokens >= 16)
    assert not any(tile.joined for tile in autotune.candidates(None, 32, False)), "its halves are two groups"


def test_tiles_that_add_the_parts_are_tried_after_the_same_without_on_nvidia_alone() -> None:
    for tokens in autotune.RANGES:
        tried = list(autotune.candidates(tokens, 64, True))
        adding = [tile for tile in tried if tile.adds_splits]
        assert [replace(tile, adds_splits=False) for tile in adding] == [
            tile for tile in tried if not tile.adds_splits and tile.block_m <= 64
        ]
        assert all(tried[tried.index(tile) - 1] == replace(tile, adds_splits=False) for tile in adding)
        others = list(autotune.candidates(tokens, 64, True, "amd"))
        assert others == [tile for tile in tried if not tile.adds_splits]


def test_a_tile_that_adds_the_parts_is_not_measured_if_k_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tiles.load(tiles.DEFAULT_TABLE)["sm_90"]
    profile = Profile(shipped, 132, inline_assembly=True, pdl=True)
    plain, adding = list(autotune.candidates(1, 64, False))[:2]
    taken = {False: 3.0, True: 1.0}
    monkeypatch.setattr(autotune, "milliseconds", lambda tile, *_: taken[tile.adds_splits])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "no GPU")
    best = lambda variants: autotune.best_tile(variants, [[]], profile, torch.device("cpu"))  # noqa: E731
    assert best([plain, adding]).adds_splits
    never = [replace(tile, max_splits=1) for tile in (plain, adding)]
    assert not best(never).adds_splits


def test_the_written_table_serves_the_found_tiles_and_keeps_the_rest(tmp_path: Path) -> None:
    shipped = tiles.load(tiles.DEFAULT_TABLE)
    found = [replace(tile, stages=5, reason="measured") for tile in shipped["sm_90"].tiles]
    int8 = replace(shipped["sm_90"].int8, min_tokens=512, reason="measured")
    output = tmp_path / "mine.json"
    autotune.write_table("sm_90", found, int8, output)
    written = tiles.load(output)
    assert written["sm_90"].tiles == tuple(found)
    assert written["sm_90"].int8 == int8
    assert {name: item for name, item in written.items() if name != "sm_90"} == {
        name: item for name, item in shipped.items() if name != "sm_90"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert json.loads(output.read_text())["version"] == tiles.TABLE_VERSION


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_it_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "morphoquant_vllm.gpu.tools.autotune", str(tmp_path / "mine.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: this machine has no GPU; tiles can only be measured on one"]
    assert not list(tmp_path.iterdir())
