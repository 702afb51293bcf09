"""The training script in seconds: caching, frozen heavy rows, and the same inputs as in calibration and serving."""

import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniThinkerForConditionalGeneration

from benchmarks.models.tiny_omni import train
from benchmarks.models.tiny_omni.data import pool, speech
from benchmarks.models.tiny_omni.data.encoding import Encoder
from benchmarks.models.tiny_omni.data.questions import Question, calibration_file, test_questions
from benchmarks.models.tiny_omni.evaluate import answer_log_probs, answers_transformers
from benchmarks.models.tiny_omni.model import ModelSettings, heavy_rows, initial_model, write_files
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples

SETTINGS = train.TrainingSettings(
    steps=2, warmup=1, learning_rate=1e-2, model=ModelSettings(hidden=128, intermediate=128, layers=1, heads=2)
)


def write_tone(path: Path, digit: int, voices: speech.Voices, generator: np.random.Generator) -> None:
    """A tone instead of speech: espeak-ng need not be there."""
    time = np.arange(int(generator.uniform(0.3, 0.6) * speech.SAMPLING_RATE)) / speech.SAMPLING_RATE
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(speech.SAMPLING_RATE)
        file.writeframes((8000 * np.sin(2 * np.pi * 100 * (digit + 1) * time)).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def few_media(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: replace(split, pictures=12, sounds=20, clips=6) for name, split in pool.SPLITS.items()}
    monkeypatch.setattr(pool, "SPLITS", small)
    monkeypatch.setattr(train, "SPLITS", small)
    monkeypatch.setattr(speech, "require_espeak", lambda: "espeak-ng")
    monkeypatch.setattr(speech, "write_spoken", write_tone)


@pytest.fixture
def model(work: Path, few_media: None) -> Path:
    return train.trained_model(work, settings=SETTINGS)


def test_full_model_loads_and_heavy_rows_kept_their_values(model: Path, tmp_path: Path) -> None:
    trained = Qwen2_5OmniForConditionalGeneration.from_pretrained(model, dtype=torch.float32).thinker
    torch.manual_seed(SETTINGS.seed)
    drawn = initial_model(SETTINGS.model, write_files(tmp_path)).thinker
    for (weight, rows), (initial, _) in zip(
        heavy_rows(trained, SETTINGS.model), heavy_rows(drawn, SETTINGS.model), strict=True
    ):
        initial = initial.detach().bfloat16().float()
        assert torch.equal(weight[rows], initial[rows])
        others = torch.ones(len(weight), dtype=torch.bool).index_fill(0, rows, False)
        assert not torch.equal(weight[others], initial[others])
        if weight.ndim == 2:
            # 35 times the spread of the other rows, which two steps hardly change: 10 is far from both.
            assert weight[rows].std() > 10 * weight[others].std()
    vision, audio = (set(rows.tolist()) for _, rows in heavy_rows(trained, SETTINGS.model)[::2])
    assert len(vision) == len(audio) == SETTINGS.model.heavy_rows
    assert not vision & audio


def test_cached_by_settings_and_same_seed_same_bytes(model: Path, work: Path, tmp_path: Path) -> None:
    def no_training(*arguments: object) -> None:
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "_train", no_training)
        assert train.trained_model(work, settings=SETTINGS) == model
        for other in (replace(SETTINGS, seed=1), replace(SETTINGS, model=replace(SETTINGS.model, heavy_factor=40.0))):
            with pytest.raises(AssertionError):
                train.trained_model(work, settings=other)
    again = train.trained_model(tmp_path, settings=SETTINGS)
    assert again.name == model.name
    first, second = load_file(model / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_interrupted_training_leaves_no_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(work.iterdir())

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.trained_model(work, settings=replace(SETTINGS, seed=5))
    assert {path for path in work.iterdir() if path.name.startswith(("model", ".model"))} <= before


def test_questions_become_what_calibration_makes_of_them(model: Path, work: Path) -> None:
    """calibration.data.rendering is tested against vLLM; the benchmark's own faster way must give the same inputs."""
    config = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model).config
    ids = {kind: [getattr(config, f"{kind}_token_id")] for kind in ("image", "video", "audio")}
    path = calibration_file(work)
    samples = build_samples(
        model,
        load_conversations(path),
        max_tokens=512,
        max_samples=30,
        placeholder_token_ids=ids,
        rows=("text", "image", "video", "audio", "any"),
    )
    encoder = Encoder(AutoProcessor.from_pretrained(model))
    seen = set()
    for sample in samples:
        line = int(sample.source.rsplit(":", 1)[1])
        batch = encoder.batch([_asked(path, line)], with_answers=True)
        # Calibration data end after the turn's last line break.
        length = batch["input_ids"].shape[1]
        assert torch.equal(sample.inputs["input_ids"][:, :length], batch["input_ids"])
        for name in set(sample.inputs) - {"input_ids", "attention_mask"}:
            assert torch.equal(sample.inputs[name].float(), batch[name].float()), name
            seen.add(name)
        assert set(batch) - {"labels"} == set(sample.inputs)
    assert {"pixel_values", "pixel_values_videos", "input_features", "video_second_per_grid"} <= seen


def _asked(path: Path, line: int) -> Question:
    user, assistant = json.loads(path.read_text().splitlines()[line - 1])["messages"]
    for part in user["content"]:
        if part["type"] != "text":
            part[part["type"]]["url"] = str(path.parent / part[part["type"]]["url"])
    return Question("any", [user], assistant["content"])


def test_batched_answers_are_those_of_single_questions(work: Path) -> None:
    # Hardly trained: two larger steps already make every answer the same.
    model = train.trained_model(work, settings=replace(SETTINGS, learning_rate=1e-5))
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor, asked = AutoProcessor.from_pretrained(model), test_questions(work, 2)
    together = answers_transformers(thinker, processor, asked, batch_size=14)
    assert together == [answers_transformers(thinker, processor, [question])[0] for question in asked]
    assert len(set(together)) > 1


def test_answers_are_scored_as_the_model_predicts_them_token_by_token(model: Path, work: Path) -> None:
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor, asked = AutoProcessor.from_pretrained(model), test_questions(work, 2)
    found = answer_log_probs(thinker, processor, asked, batch_size=14)
    encoder = Encoder(processor)
    for question, log_probs in zip(asked, found, strict=True):
        batch = encoder.batch([question], with_answers=True)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = thinker(**batch, use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        tokens = labels[0][labels[0] >= 0]
        loss = -log_probs.gather(1, tokens[:, None]).sum()
        # Only the padding of a batch differs.
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)


def test_labels_are_the_answers_and_the_end_of_the_turn(model: Path, work: Path) -> None:
    processor, asked = AutoProcessor.from_pretrained(model), test_questions(work, 3)
    batch = Encoder(processor).batch(asked, with_answers=True)
    for question, labels in zip(asked, batch["labels"], strict=True):
        assert processor.tokenizer.decode(labels[labels >= 0]) == f"{question.answer}<|im_end|>"
