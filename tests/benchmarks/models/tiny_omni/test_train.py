"""The training script in seconds: caching, frozen heavy rows, and the same inputs as in calibration and serving."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from benchmarks.models import decoder
from benchmarks.models.tiny_omni import train
from benchmarks.models.tiny_omni.data import pool, speech
from benchmarks.models.tiny_omni.data.encoding import Encoder
from benchmarks.models.tiny_omni.data.questions import Question, calibration_file, test_questions
from benchmarks.models.tiny_omni.evaluate import answer_log_probs, answers_transformers
from benchmarks.models.tiny_omni.experts import ExpertsSettings
from benchmarks.models.tiny_omni.model import ModelSettings
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from tests.benchmarks.models.tiny_omni.tones import write_tone

SIZES = {"hidden": 128, "layers": 1, "heads": 2}
SETTINGS = train.TrainingSettings(steps=2, warmup=1, learning_rate=1e-2, model=ModelSettings(intermediate=128, **SIZES))
EXPERTS = replace(SETTINGS, threads=1, model=ExpertsSettings(intermediate=64, experts=4, **SIZES))


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


families = pytest.mark.parametrize("settings", [SETTINGS, EXPERTS], ids=["dense", "experts"])


@families
def test_full_model_loads_and_heavy_rows_kept_their_values(
    settings: train.TrainingSettings, work: Path, tmp_path: Path
) -> None:
    family = train.family_of(settings.model)
    torch.manual_seed(settings.seed)
    full = family.initial_model(settings.model, family.write_files(tmp_path))
    trained = type(full).from_pretrained(train.trained_model(work, settings=settings), dtype=torch.float32).thinker
    holders = [family.heavy_rows(thinker, settings.model) for thinker in (trained, full.thinker)]
    for (weight, rows), (initial, _) in zip(*holders, strict=True):
        initial = initial.detach().bfloat16().float()
        assert torch.equal(weight[rows], initial[rows])
        others = torch.ones(len(weight), dtype=torch.bool).index_fill(0, rows, False)
        assert not torch.equal(weight[others], initial[others])
        if weight.ndim == 2:
            # 35 times the spread of the other rows, which two steps hardly change: 10 is far from both.
            assert weight[rows].std() > 10 * weight[others].std()
    vision, audio = (set(rows.tolist()) for _, rows in holders[0][::2])
    assert len(vision) == len(audio) == settings.model.heavy_rows
    assert not vision & audio


def test_experts_lie_on_disk_one_by_one_and_all_of_them_learned(work: Path, tmp_path: Path) -> None:
    stored = load_file(train.trained_model(work, settings=EXPERTS) / "model.safetensors")
    family = train.family_of(EXPERTS.model)
    torch.manual_seed(EXPERTS.seed)
    drawn = family.initial_model(EXPERTS.model, family.write_files(tmp_path)).thinker.model.layers[0].mlp.experts
    stem = "thinker.model.layers.0.mlp.experts"
    for expert in range(4):
        gate, up = drawn.gate_up_proj[expert].detach().bfloat16().chunk(2)
        wanted = {"gate_proj": gate, "up_proj": up, "down_proj": drawn.down_proj[expert].detach().bfloat16()}
        for part, initial in wanted.items():
            learned = stored[f"{stem}.{expert}.{part}.weight"]
            assert learned.shape == initial.shape and not torch.equal(learned, initial)
            # Two steps of 0.01 at most: the neighbours' weights are much farther away.
            assert (learned - initial).abs().max() < 0.03
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in stored)


def test_unequal_use_of_experts_adds_to_the_loss(work: Path) -> None:
    directory = train.trained_model(work, settings=EXPERTS)
    thinker = decoder.load(directory)
    batch = Encoder(AutoProcessor.from_pretrained(directory)).batch(test_questions(work, 1), with_answers=True)
    losses = [
        train._loss(thinker, dict(batch), replace(EXPERTS.model, balance=balance))[0].item() for balance in (0.0, 1.0)
    ]
    batch.pop("labels")
    wanted = thinker(**batch, use_cache=False, output_router_logits=True).aux_loss.item()
    # Two of the experts serve each token: 2 if all are equally busy, more if not.
    assert wanted >= 2 - 1e-4
    assert losses[1] - losses[0] == pytest.approx(wanted, rel=1e-4)


@families
def test_interrupted_training_goes_on_as_if_it_had_not_been(
    settings: train.TrainingSettings, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train.trained_model(work, settings=settings)
    monkeypatch.setattr(train, "KEEP_EVERY", 1)

    def interrupted(path: Path, step: int, *state: object) -> None:
        keep(path, step, *state)
        raise KeyboardInterrupt

    keep = train.keep
    monkeypatch.setattr(train, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.trained_model(tmp_path, settings=settings)
    state = tmp_path / f"{whole.name}.state"
    assert torch.load(state, weights_only=True)["step"] == 1
    monkeypatch.setattr(train, "keep", keep)
    first, second = (
        load_file(model / "model.safetensors") for model in (whole, train.trained_model(tmp_path, settings=settings))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not state.exists()


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


@families
def test_questions_become_what_calibration_makes_of_them(settings: train.TrainingSettings, work: Path) -> None:
    """calibration.data.rendering is tested against vLLM; the benchmark's own faster way must give the same inputs."""
    model = train.trained_model(work, settings=settings)
    architecture, config = decoder.architecture_of(model)
    path = calibration_file(work)
    samples = build_samples(
        model,
        load_conversations(path),
        max_tokens=512,
        max_samples=30,
        placeholder_token_ids=architecture.placeholder_token_ids(config),
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


@families
def test_batched_answers_are_those_of_single_questions(settings: train.TrainingSettings, work: Path) -> None:
    # Hardly trained: two larger steps already make every answer the same.
    model = train.trained_model(work, settings=replace(settings, learning_rate=1e-5))
    thinker = decoder.load(model)
    processor, asked = AutoProcessor.from_pretrained(model), test_questions(work, 2)
    together = answers_transformers(thinker, processor, asked, batch_size=14)
    assert together == [answers_transformers(thinker, processor, [question])[0] for question in asked]
    assert len(set(together)) > 1


def test_answers_are_scored_as_the_model_predicts_them_token_by_token(model: Path, work: Path) -> None:
    thinker = decoder.load(model)
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
