"""`python -m benchmarks.accuracy moe-omni`: on a model of two steps, and the trained one against its bars."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy.methods import EXPERTS, MOE_OMNI, known_methods
from benchmarks.accuracy.reporting import bars
from benchmarks.accuracy.settings import Settings
from benchmarks.models.tiny_omni import train
from benchmarks.models.tiny_omni.data import pool, speech
from benchmarks.models.tiny_omni.data.questions import KINDS
from benchmarks.models.tiny_omni.experts import ExpertsSettings
from tests.benchmarks.models.tiny_omni.tones import write_tone

REPOSITORY = Path(__file__).parents[3]
SIMULATED = "16bit,w4a16-rtn-g32,w4a4-token"


def run(monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", MOE_OMNI, *line])
    command.main()


@pytest.fixture
def few_media(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: replace(split, pictures=12, sounds=20, clips=6) for name, split in pool.SPLITS.items()}
    monkeypatch.setattr(pool, "SPLITS", small)
    monkeypatch.setattr(train, "SPLITS", small)
    monkeypatch.setattr(speech, "require_espeak", lambda: "espeak-ng")
    monkeypatch.setattr(speech, "write_spoken", write_tone)


@pytest.mark.full
def test_a_mixture_of_experts_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_media: None) -> None:
    sizes = ExpertsSettings(hidden=128, intermediate=64, layers=1, heads=2, experts=4)
    settings = replace(train.experts_training(), steps=2, warmup=1, model=sizes)
    model = train.trained_model(tmp_path, settings=settings)
    flags = {"omni-work": tmp_path, "model": model, "work": tmp_path / "work", "results": tmp_path / "results"}
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    run(monkeypatch, [*line, "--questions", "2", "--methods", SIMULATED])
    found = json.loads((tmp_path / "results" / "moe-omni.json").read_text())["methods"]
    assert list(found) == SIMULATED.split(",")
    stem = "model.layers.0.mlp.experts"
    exact, rounded, both = (found[name]["expert-errors"][stem] for name in SIMULATED.split(","))
    assert exact["tokens"] == rounded["tokens"] == both["tokens"] and len(exact["tokens"]) == 4
    assert max(exact["error"]) < 1e-5 < 0.01 < min(rounded["error"]) and max(rounded["error"]) < min(both["error"])
    divergence = [found[name]["kinds"]["all"]["divergence"] for name in SIMULATED.split(",")]
    assert abs(divergence[0]) < 1e-6 < divergence[1] < divergence[2]
    assert list(found["16bit"]["kinds"]) == [*KINDS, "all"]


def test_its_methods_need_no_other_benchmark() -> None:
    assert known_methods(MOE_OMNI) == list(EXPERTS)
    assert set(EXPERTS) <= set(known_methods("omni"))


@pytest.mark.full
def test_the_trained_model_meets_its_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is missing is made: with nothing but the trained model an hour on two cores."""
    settings = Settings()
    work = REPOSITORY / settings.omni_work
    if not train.model_path(work, train.experts_training()).is_dir():
        pytest.skip(f"{work} has no trained mixture of experts: python -m benchmarks.models.tiny_omni --experts")
    monkeypatch.chdir(REPOSITORY)
    run(monkeypatch, ["--results", str(tmp_path)])
    summary = json.loads((tmp_path / "moe-omni.json").read_text())
    assert summary["methods"]["16bit"]["kinds"]["all"]["accuracy"] > 0.85
    checked = bars.check(summary)
    assert len(checked) == 4
    missed = [(asked, figures) for asked, met, figures in checked if not met]
    # GPTQ's activations have 16 bits, ours 4: they diverge more (docs/results/accuracy.md#a-mixture-of-experts).
    assert all(asked.startswith("divergence at most") for asked, _ in missed), missed
