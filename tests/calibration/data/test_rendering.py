"""Samples of conversations and texts: which are taken, what is cut, what is left out."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from calibration.data.conversations import PlainText
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.rendering import build, conversations, copy_without_template, refusal

IMAGE = {"type": "image_url", "image_url": {"url": "image.png"}}
AUDIO = {"type": "audio_url", "audio_url": {"url": "long.wav"}}
SHORT_AUDIO = {"type": "audio_url", "audio_url": {"url": "short.wav"}}


def test_undecodable_media_are_left_out_only_on_request(
    omni: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [{"type": "image_url", "image_url": {"url": "long.wav"}}]
    data = conversations(folder, "fine", bad, [AUDIO])
    assert "--skip-bad" in refusal(omni, data)
    with caplog.at_level(logging.WARNING, logger="calibration.data.rendering"):
        samples = build(omni, data, skip_bad=True)
    assert [sample.source[-2:] for sample in samples] == [":1", ":3"]
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("skipped: ") and "data.jsonl:2: " in first and "long.wav" in first
    assert last == "1 of 3 samples were skipped because they cannot be used"
    with pytest.raises(MorphoQuantError, match="no calibration sample is left"):
        build(omni, data[1:2], skip_bad=True)


def test_skip_bad_leaves_out_whatever_belongs_to_one_conversation(
    omni: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = {"type": "text", "text": "look: <|IMAGE|>"}
    bad = {
        "too short for a token": [SHORT_AUDIO],
        "NaN or infinite": [{"type": "audio_url", "audio_url": {"url": "nan.wav"}}],
        "longer than": [{"type": "audio_url", "audio_url": {"url": "minute.wav"}}],
        "more than max_tokens=200": [IMAGE] * 20,
        "the text itself holds <|IMAGE|>": [held],
    }
    data = conversations(folder, "fine", *bad.values())
    with caplog.at_level(logging.WARNING, logger="calibration.data.rendering"):
        (sample,) = build(omni, data, max_tokens=200, skip_bad=True)
    assert sample.source.endswith(":1")
    *skipped, count = (record.getMessage() for record in caplog.records)
    for line, (reason, message) in enumerate(zip(bad, skipped, strict=True), start=2):
        assert message.startswith("skipped: ") and f"data.jsonl:{line}: " in message and reason in message
    assert count == "5 of 6 samples were skipped because they cannot be used"
    caplog.clear()
    assert "5 conversations cannot be used (the log lists the first 5; --skip-bad" in refusal(omni, data, 200)
    assert [reason in caplog.messages[index] for index, reason in enumerate(bad)] == [True] * 5


def test_a_medium_that_the_model_lacks_and_a_window_with_a_placeholder_are_left_out(vl: Path, folder: Path) -> None:
    data = [*conversations(folder, [AUDIO], "fine"), PlainText("book.txt", "before <|image_pad|> after")]
    assert [sample.source for sample in build(vl, data, skip_bad=True)] == [f"{folder / 'data.jsonl'}:2"]


@pytest.mark.parametrize("model", ["vl", "llama"])
def test_long_text_is_cut_and_the_count_logged(
    model: str, folder: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(model)
    data = conversations(folder, "word " * 100, "ok")
    whole = build(directory, data)
    with caplog.at_level(logging.WARNING, logger="calibration.data.rendering"):
        samples = build(directory, data, max_tokens=60)
    assert [s.modality.numel() for s in samples] == [60, whole[1].modality.numel()]
    assert all(value.shape == (1, 60) for value in samples[0].inputs.values())
    assert torch.equal(samples[0].inputs["input_ids"], whole[0].inputs["input_ids"][:, :60])
    assert [record.getMessage() for record in caplog.records] == ["1 of 2 samples were cut to max_tokens=60 tokens"]


def test_plain_text_is_cut_into_windows_without_loss(llama: Path) -> None:
    text = "Two rivers meet below the old town, where the market is held every week. " * 20
    expected = AutoTokenizer.from_pretrained(llama)(text)["input_ids"]
    samples = build(llama, [PlainText("book.txt", text)], max_tokens=100)
    assert [s.modality.numel() for s in samples[:-1]] == [100] * (len(samples) - 1)
    assert [number for s in samples for number in s.inputs["input_ids"][0].tolist()] == expected


def test_every_window_starts_with_the_tokenizers_bos(llama: Path, tmp_path: Path) -> None:
    copy_without_template(llama, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    bos = {"id": "<|im_start|>", "type_id": 0}
    sequence = [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}]
    number = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos["id"])
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": [number], "tokens": [bos["id"]]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos["id"], "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    samples = build(tmp_path, [PlainText("book.txt", "one two three four five six " * 20)], max_tokens=50)
    assert len(samples) > 2
    for sample in samples:
        ids = sample.inputs["input_ids"][0].tolist()
        assert ids[0] == number and number not in ids[1:] and len(ids) <= 50


def test_max_samples_are_evenly_spaced_over_all_data(llama: Path, folder: Path) -> None:
    data = conversations(folder, *(f"number {i}" for i in range(10)))
    assert [s.source.rsplit(":", 1)[1] for s in build(llama, data, max_samples=4)] == ["1", "3", "6", "8"]
    assert len(build(llama, data, max_samples=20)) == 10


def test_conversations_and_windows_are_chosen_together_before_rendering(
    llama: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = PlainText("book.txt", "one two three four five six " * 40)
    data = [*conversations(folder, *(f"number {i}" for i in range(4))), text]
    windows = len(build(llama, [text], max_tokens=32))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="calibration.data.rendering"):
        samples = build(llama, data, max_tokens=2048, window_tokens=32, max_samples=4)
    assert len(samples) == 4
    assert sum(sample.source == "book.txt" for sample in samples) > 1
    tokens = sum(sample.modality.numel() for sample in samples)
    assert [record.getMessage() for record in caplog.records] == [
        f"taking 4 of {4 + windows} calibration samples, evenly spaced",
        f"calibration data: 4 samples, tokens: text {tokens}",
    ]


def test_bad_settings(llama: Path) -> None:
    text = [PlainText("t", "hello")]
    assert "max_tokens=1" in refusal(llama, text, max_tokens=1)
    assert "max_samples=0" in refusal(llama, text, max_samples=0)
    assert "no calibration data" in refusal(llama, [])
