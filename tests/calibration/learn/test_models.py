"""Learning of every kind of model that is calibrated: it runs, or a line says why it does not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from calibration import calibrate as module
from calibration.calibrate import calibrate
from calibration.learn import extent
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.tiny_conversations import write_calibration_data
from tests.tiny_decoders import DECODERS, build_tiny_decoder
from tests.tiny_media_models import build_tiny_qwen2_audio, build_tiny_qwen3_5
from tests.tiny_models import build_tiny_omni, build_tiny_qwen2_5_vl, build_tiny_reward_model

RECIPE = Recipe(device="cpu", rounding="nearest", regression=False)
# Its config lacks the size of the vocabulary, as those of some published models do.
QUICK = ("phi3",)
MEDIA: dict[str, Callable[[Path], object]] = {
    "omni": build_tiny_omni,
    "vl": build_tiny_qwen2_5_vl,
    "qwen3_5": build_tiny_qwen3_5,
    "audio": build_tiny_qwen2_audio,
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent, "LEAST_TOKENS", 16)
    # vLLM's names have tests of their own.
    monkeypatch.setattr(module, "check_names", lambda source, spec: None)


def data_of(directory: Path, kind: str) -> Path:
    """Sixteen conversations, of which the default holds two out."""
    path = write_calibration_data(directory, kind)
    lines = path.read_text().splitlines()
    path.write_text("\n".join((16 * lines)[:16]))
    return path


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in DECODERS if name not in QUICK)]
)
def test_a_decoder_learns(name: str, tmp_path: Path) -> None:
    model = build_tiny_decoder(name, tmp_path / "model")
    report = calibrate(model, data_of(tmp_path / "data", "text"), tmp_path / "out", recipe=RECIPE)
    # Where a model learns, its inputs share one budget of escapes.
    assert report["settings"]["budget"] == "model" and len(set(report["escape_budgets"].values())) > 1
    found = report["learning"]
    assert found["samples"] == 14 and found["judging_samples"] == 2
    # A model whose next token is certain has nothing to learn.
    assert found["divergence_after"] <= found["divergence_before"]
    verify_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "omni" else pytest.mark.full) for kind in MEDIA]
)
def test_a_decoder_of_media_learns(kind: str, tmp_path: Path) -> None:
    MEDIA[kind](tmp_path / "model")
    data = data_of(tmp_path / "data", "vl" if kind == "qwen3_5" else kind)
    found = calibrate(tmp_path / "model", data, tmp_path / "out", recipe=RECIPE)["learning"]
    assert found["divergence_after"] <= found["divergence_before"]
    verify_checkpoint(tmp_path / "out")


def test_a_model_that_writes_no_text_learns_nothing_and_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = build_tiny_reward_model(tmp_path / "model")
    report = calibrate(model, data_of(tmp_path / "data", "text"), tmp_path / "out", recipe=RECIPE)
    assert "learning" not in report and "do not learn: the model has no head that writes text" in caplog.text
    verify_checkpoint(tmp_path / "out")
