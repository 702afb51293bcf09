"""The training in seconds, on a few lines: caching, resuming and the files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models.small_text import books, train

LINES = [" ".join(f"{word} {number}" for number in range(60)) for word in ("one", "two", "three")]
SETTINGS = train.TrainingSettings(
    threads=1, vocabulary=300, hidden=32, intermediate=64, layers=1, heads=2, window=16, batch=4, steps=30, warmup=5
)


@pytest.fixture(autouse=True)
def few_books(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "fetch", lambda directory: directory)
    monkeypatch.setattr(books, "training_books", lambda directory: LINES)
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "KEEP_EVERY", 10)


def test_it_learns_and_is_written_in_bfloat16_with_its_tokenizer(tmp_path: Path) -> None:
    said: list[str] = []
    model = train.trained_model(tmp_path, SETTINGS, said.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in said]
    assert len(losses) == 3 and losses[2] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer(LINES[0])["input_ids"]) == LINES[0]
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = train.trained_model(tmp_path / "whole", SETTINGS)

    def interrupt(line: str) -> None:
        if "step 20/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.trained_model(tmp_path / "cut", SETTINGS, interrupt)
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".state"]
    said: list[str] = []
    cut = train.trained_model(tmp_path / "cut", SETTINGS, said.append)
    # Kept after 10 steps; it was told of 20 before these were kept.
    assert [line.split()[1] for line in said] == ["20/30", "30/30"]
    assert cut.name == whole.name
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_other_settings_are_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train.trained_model(tmp_path, SETTINGS)
    assert train.trained_model(tmp_path, replace(SETTINGS, seed=1)) != first
    monkeypatch.setattr(train, "_train", None)
    assert train.trained_model(tmp_path, SETTINGS) == first


def test_the_rate_rises_in_the_warm_up_and_falls_to_nothing() -> None:
    rates = [train.rate(step, SETTINGS) for step in range(SETTINGS.steps)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[4] == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(1 / 25)


def test_weights_of_a_trained_model_lie_on_no_4_bit_grid(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(train.trained_model(tmp_path, SETTINGS))
    for name, weight in loaded.model.layers.named_parameters():
        if weight.ndim == 2:
            # Groups of 32 on such a grid hold 16 values at most; of bfloat16 draws hardly two are the same.
            assert min(len(group.unique()) for group in weight.flatten().split(32)) > 16, name
