"""Sources of the errors of linears, on a tiny model and its checkpoint."""

from pathlib import Path

import pytest
import torch

from benchmarks.error_sources.__main__ import parser
from benchmarks.error_sources.inputs import PairedInput, load_pair, paired_inputs
from benchmarks.error_sources.measure import CALIBRATION, measure
from benchmarks.error_sources.report import markdown
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels

# A calibrated checkpoint is loaded.
pytestmark = pytest.mark.slow

INPUTS = ["1.self_attn.qkv_proj", "1.self_attn.o_proj", "1.mlp.gate_up_proj", "1.mlp.down_proj"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("error-sources")
    source = TinyModels(folder / "source").model("llama")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(source, TinyModels(folder / "data").data("llama"), folder / "quantized", recipe=recipe)
    return source, folder / "quantized"


@pytest.fixture(scope="module")
def found(directories: tuple[Path, Path]) -> list[PairedInput]:
    generator = torch.Generator().manual_seed(0)
    windows = {
        text: torch.randint(20, 60, (count, 64), generator=generator).tolist()
        for text, count in ((CALIBRATION, 8), ("held", 2))
    }
    return paired_inputs(directories[0], load_pair(*directories), 1, windows)


def test_errors_are_told_apart_by_their_source(found: list[PairedInput]) -> None:
    assert [own.name for own in found] == INPUTS
    for own in found:
        row = measure(own, [1e6], [4.0])
        # Rounding of weights and the errors of earlier layers come on top of the input's own rounding.
        assert 0 < row["own"] < row["served"] < 1 and 0 < row["before"] < 1
        assert row["tokens"] == pytest.approx(8 * 64, rel=1e-3)
        # An endless pull gives the original weights.
        assert row["pulls"]["1000000.0"] == pytest.approx(row["plain"], rel=1e-3)
        assert row["strengths"]["4.0"] != row["plain"]


def test_without_errors_nothing_but_the_own_rounding_is_left(found: list[PairedInput]) -> None:
    own = found[0]
    exact = PairedInput(own.name, own.weights, own.served, own.exact, own.exact)
    row = measure(exact, [], [])
    assert row["before"] == 0
    # The bias of the fit is that of the calibration tokens.
    assert row["plain"] == pytest.approx(row["own"], rel=0.1)


def test_a_model_without_quantized_linears_and_a_missing_block_are_named(directories: tuple[Path, Path]) -> None:
    source, checkpoint = directories
    with pytest.raises(MorphoQuantError, match="has no quantized linear"):
        load_pair(source, source)
    with pytest.raises(MorphoQuantError, match=r"block 7: .* blocks 0 to 1"):
        paired_inputs(source, load_pair(source, checkpoint), 7, {})


def test_the_table_has_a_line_for_each_input() -> None:
    row = {
        "input": "1.mlp.down_proj",
        "in_features": 64,
        "tokens": 512.0,
        "before": 0.01,
        "own": 0.002,
        "served": 0.02,
        "plain": 0.015,
        "pulls": {"0.02": 0.016},
        "strengths": {"4.0": 0.0142},
    }
    result = {
        "command": "python -m benchmarks.error_sources A B",
        "machine": "A",
        "versions": {"torch": "2"},
        "model": "A",
        "held_out_tokens": 128,
        "rows": [row],
    }
    text = markdown(result)
    assert "| 1.mlp.down_proj | 64 | 10.00 | 2.00 | 20.00 | 15.00 | 16.00 | 14.20 |" in text
    assert parser().parse_args(["A", "B"]).results == Path("benchmarks/results/error_sources")
