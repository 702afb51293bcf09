"""The autotune command, as far as it goes without a GPU: its candidates, its table, its refusal."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.gpu import tiles
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
    assert done.stderr.strip().splitlines() == ["error: no GPU is at hand: tiles can only be measured on one"]
    assert not list(tmp_path.iterdir())
