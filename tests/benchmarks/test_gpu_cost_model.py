"""The cost model's arithmetic, and its output is marked as an estimate."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_cost_model.gpus import GPUS
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile

model = pytest.importorskip("benchmarks.gpu_cost_model.model", reason="needs triton")
resources = pytest.importorskip("morphoquant_vllm.gpu.tools.binary_resources", reason="needs triton")

TILE = Tile(None, (128,), False, 64, 16, 4, 4, 2, False, 4, 16, adds_splits=False, reason="test")
USED = resources.Resources(80, 0, 0, 36864, 128, frozenset(), 24, 0, 2, (), ("IMMA",) * 200)


def test_decode_is_bounded_by_the_bytes_it_reads() -> None:
    found = model.estimate(GPUS["L20"], TILE, 1, USED, 4, 1, 18944, 3584, 128)
    weights = 18944 * 3584 / 2
    assert found.limit == "bandwidth"
    # Beside the weights: one scale in 128 weights, 3584 codes, 18944 outputs.
    assert weights < found.bandwidth * 864e9 < 1.04 * weights
    assert found.bfloat16 == pytest.approx(157.2e-6, rel=0.01), "the roofline of a 7B's MLP on an L20"


def test_split_k_pays_for_its_partial_sums() -> None:
    whole = model.estimate(GPUS["H100"], TILE, 1, USED, 4, 16, 3584, 18944, 128)
    split = model.estimate(GPUS["H100"], TILE, 8, USED, 4, 16, 3584, 18944, 128)
    assert (split.bandwidth - whole.bandwidth) * 3350e9 == pytest.approx(8 * 8 * 16 * 3584)
    assert split.issue < whole.issue, "56 programs leave most of 132 multiprocessors idle"


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_two_level_scales_are_a_word_for_128_channels_in_two_steps_a_turn(group_size: int) -> None:
    two_level = dataclasses.replace(TILE, two_level=True)
    grouped = model.estimate(GPUS["H100"], TILE, 1, USED, 4, 16, 3584, 18944, 128)
    found = model.estimate(GPUS["H100"], two_level, 1, USED, 4, 16, 3584, 18944, group_size)
    # A channel scale of four bytes for each output.
    saved = 3584 * (18944 // 128 * (2 - 4) - 4)
    assert (grouped.bandwidth - found.bandwidth) * 3350e9 == pytest.approx(saved)
    assert found.issue == pytest.approx(grouped.issue), "both loops take 128 channels a turn"


def test_the_int8_path_unpacks_first_and_then_multiplies() -> None:
    tile = Int8Tile(None, 128, 128, 128, 8, 3, True, False, 2, "test")
    unpacking = dataclasses.replace(USED, threads=256, instructions=("LDG",) * 200)
    used = dataclasses.replace(USED, threads=256, loop=("IGMMA",) * 80)
    gpu = GPUS["H100"]
    found = model.estimate_int8(gpu, tile, unpacking, used, 2, 2048, 3584, 18944)
    size = 3584 * 18944
    # Half a byte and a thirty-second of a level are read, a byte is written and read again.
    moved = size * (0.5 + 1 / 32 + 1 + 1) + 4 * 3584 + 2048 * 18944 + 2 * 2048 * 3584
    assert found.bandwidth * gpu.bandwidth == pytest.approx(moved)
    # Programs of 8 warps: one for each 128 x 128 weights, and one for each 128 x 128 outputs over 148 turns.
    issued = 8 * (28 * 148 * 200 + 16 * 28 * 148 * 80 * model.stretch(16 * 28, gpu.units, 2))
    assert found.issue * 4 * gpu.units * gpu.clock == pytest.approx(issued)
    assert found.seconds > found.units, "unpacking comes on top of the limit of the product"


@pytest.mark.parametrize(
    ("programs", "expected"), [(132, 1.0), (66, 2.0), (264, 1.0), (265, 396 / 265), (528, 1.0), (529, 1056 / 529)]
)
def test_uneven_work_stretches_compute(programs: int, expected: float) -> None:
    assert model.stretch(programs, 132, 4) == pytest.approx(expected)


@pytest.mark.parametrize("options", [[], pytest.param(["--two-level"], marks=pytest.mark.full)])
def test_the_command_marks_everything_as_an_estimate(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "estimates.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_cost_model",
        "--gpus",
        "H100",
        "--tokens",
        "1",
        "--json",
        str(path),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ESTIMATES, nothing measured: H100" in done.stdout
    assert ("two-level scales" in done.stdout) == bool(options)
    assert "no speed is claimed" in " ".join(done.stdout.split())
    written = json.loads(path.read_text())
    assert written["estimates_only"] is True
    assert {row["path"] for row in written["rows"]} == ({"int4", "int8"} if options else {"int4"})
    assert all(row["chosen"] == (row["path"] == "int4") for row in written["rows"]), "of one token"
    assert all(row["estimate"] is True and row["seconds"] > 0 and row["issue"] > 0 for row in written["rows"])
