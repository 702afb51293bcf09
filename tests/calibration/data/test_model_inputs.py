"""Conversations become inputs of the tiny models by their own processors, up to a forward pass of the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5OmniForConditionalGeneration

from calibration.data import model_inputs
from calibration.data.conversations import Conversation, Message, PlainText, Text
from calibration.data.data_files import load_conversations
from tests.calibration.media_files import encode_video
from tests.calibration.rendering import ROWS, build, conversations, copy_without_template, placeholders, refusal
from tests.tiny_experts import build_tiny_qwen3_omni_moe

IMAGE = {"type": "image_url", "image_url": {"url": "image.png"}}
AUDIO = {"type": "audio_url", "audio_url": {"url": "long.wav"}}
SHORT_AUDIO = {"type": "audio_url", "audio_url": {"url": "short.wav"}}
VIDEO = {"type": "video_url", "video_url": {"url": "video.mp4"}}


def test_omni_sample_of_every_modality_runs_through_the_thinker(omni: Path, folder: Path) -> None:
    question = {"type": "text", "text": "What is this?"}
    (sample,) = build(omni, conversations(folder, [IMAGE, AUDIO, VIDEO, question]))
    inputs = sample.inputs
    assert sample.source == f"{folder / 'data.jsonl'}:1"
    assert sample.modality.dtype == torch.int32 and sample.modality.shape == inputs["input_ids"][0].shape
    ids = placeholders(omni)
    for row, kind in enumerate(ROWS[1:4], start=1):
        assert torch.equal(sample.modality == row, inputs["input_ids"][0] == ids[kind][0])
    # 112 x 84 pixels, 28 x 28 a token. Audio of 2.3 s: 230 frames of 10 ms, halved twice. 3.1 s at 2 fps: 6 frames.
    assert int((sample.modality == 1).sum()) == 12
    assert int((sample.modality == 3).sum()) == 57
    assert inputs["video_grid_thw"][0, 0] == 3
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(omni, dtype=torch.float32).thinker.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        # Trimming the audio's padding must change nothing: the forward selects by the mask.
        padded = dict(inputs)
        for name in ("input_features", "feature_attention_mask"):
            padded[name] = torch.nn.functional.pad(inputs[name], (0, 100))
        assert torch.equal(model(**padded).logits, logits)
        # ... and the media must count.
        other = inputs | {"input_features": inputs["input_features"].flip(-1)}
        assert not torch.equal(model(**other).logits, logits)
    assert logits.shape == (1, sample.modality.numel(), 512) and logits.isfinite().all()


def test_omni_takes_several_media_of_one_kind_and_text_only_lines(omni: Path, folder: Path) -> None:
    samples = build(omni, conversations(folder, [AUDIO, IMAGE, AUDIO, IMAGE], "Say hello."))
    assert [torch.bincount(s.modality, minlength=5).tolist()[1:] for s in samples] == [[24, 0, 114, 0], [0] * 4]
    assert set(samples[1].inputs) == {"input_ids", "attention_mask"}


def test_vl_sample_runs_through_the_model(vl: Path, folder: Path) -> None:
    data = [*conversations(folder, [IMAGE, VIDEO, {"type": "text", "text": "?"}]), PlainText("t", "Two rivers meet.")]
    samples = build(vl, data)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(vl, dtype=torch.float32).eval()
    assert {1, 2} <= set(samples[0].modality.tolist()) and set(samples[1].modality.tolist()) == {0}
    with torch.no_grad():
        for sample in samples:
            logits = model(**sample.inputs).logits
            assert logits.shape[1] == sample.modality.numel() and logits.isfinite().all()
    # 25 frames at 8 fps: 6 of them are taken, two per grid step.
    assert samples[0].inputs["second_per_grid_ts"].item() == pytest.approx(2 / (6 / 25 * 8))


def test_a_clips_seconds_are_the_processors_own_unless_its_config_names_a_rate(tmp_path: Path, folder: Path) -> None:
    """vLLM leaves the rate to the processor: positions of served and of calibrated clips would differ otherwise."""
    model = build_tiny_qwen3_omni_moe(tmp_path)
    (sample,) = build(model, conversations(folder, [VIDEO]))
    assert sample.inputs["video_grid_thw"][0, 0] == 3
    assert sample.inputs["video_second_per_grid"].tolist() == [2.0]
    config = tmp_path / "video_preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fps": 4}))
    (sample,) = build(model, conversations(folder, [VIDEO]))
    assert sample.inputs["video_grid_thw"][0, 0] == 6
    assert sample.inputs["video_second_per_grid"].tolist() == [0.5]


def test_vl_refuses_audio(vl: Path, folder: Path) -> None:
    message = refusal(vl, conversations(folder, "fine", [AUDIO]))
    assert "data.jsonl:2: the model does not take audio parts, only text, image, video; remove" in message


def test_text_model_refuses_media(llama: Path, folder: Path) -> None:
    assert "data.jsonl:1: the model does not take image parts, only text" in refusal(
        llama, conversations(folder, [IMAGE])
    )


def test_text_model_renders_with_its_chat_template(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    turns = [("user", "Hello"), ("assistant", "Hi there")]
    for count, generation in ((1, True), (2, False)):
        messages = [{"role": role, "content": content} for role, content in turns[:count]]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=generation)["input_ids"]
        conversation = Conversation("c", tuple(Message(role, (Text(content),)) for role, content in turns[:count]))
        (sample,) = build(llama, [conversation], rows=("any",))
        assert sample.inputs["input_ids"][0].tolist() == expected
        assert sample.modality.tolist() == [0] * len(expected)


def test_text_parts_of_one_message_are_joined_for_text_models(llama: Path) -> None:
    parts, joined = (
        Conversation("c", (Message("user", texts),)) for texts in ((Text("one"), Text("two")), (Text("one\ntwo"),))
    )
    first, second = build(llama, [parts, joined])
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])


def test_tokenizer_without_a_template_joins_with_newlines(llama: Path, tmp_path: Path) -> None:
    copy_without_template(llama, tmp_path)
    turns = (Message("user", (Text("Hello"),)), Message("assistant", (Text("Hi"),)))
    (sample,) = build(tmp_path, [Conversation("c", turns)])
    assert AutoTokenizer.from_pretrained(tmp_path).decode(sample.inputs["input_ids"][0]) == "Hello\nHi"
    empty = Conversation("file:3", (Message("user", (Text(""),)),))
    assert "file:3: the conversation has no tokens" in refusal(tmp_path, [empty])


def test_a_template_that_writes_nothing_leaves_no_tokens(vl: Path, tmp_path: Path) -> None:
    copy_without_template(vl, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if false %}nothing{% endif %}")
    spoken = Conversation("file:3", (Message("user", (Text("Hello"),)),))
    assert "file:3: the conversation has no tokens" in refusal(tmp_path, [spoken])


def test_a_processor_that_samples_videos_in_its_own_way_is_named(
    vl: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA's processors of videos have no temporal patches."""
    monkeypatch.setitem(model_inputs._ASKED, "video", ("fps", "no_such_attribute"))
    message = refusal(vl, conversations(folder, [VIDEO]))
    assert (
        "samples video parts in its own way (it has no no_such_attribute)" in message and "remove the line" in message
    )


def test_processor_without_a_template_refuses_media(omni: Path, folder: Path, tmp_path: Path) -> None:
    copy_without_template(omni, tmp_path)
    assert "data.jsonl:1: the model has no chat template" in refusal(tmp_path, conversations(folder, [IMAGE]))


def test_template_that_refuses_the_conversation(llama: Path, tmp_path: Path) -> None:
    copy_without_template(llama, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must\nalternate') }}")
    message = refusal(tmp_path, [Conversation("file:3", (Message("user", (Text("a"),)),))])
    assert "file:3: the model's chat template refuses the conversation (roles must alternate)" in message


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages + 1 }}", "TypeError: can only concatenate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ range(1000000) | list }}", "OverflowError"),
    ],
)
def test_template_that_fails_in_a_way_of_its_own(template: str, reason: str, llama: Path, tmp_path: Path) -> None:
    copy_without_template(llama, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    message = refusal(tmp_path, [Conversation("file:3", (Message("user", (Text("a"),)),))])
    assert f"file:3: the model's chat template refuses the conversation ({reason}" in message


@pytest.mark.parametrize(("placeholder", "parts"), [("<|IMAGE|>", []), ("<|AUDIO|>", [AUDIO])])
def test_text_that_holds_a_placeholder(omni: Path, folder: Path, placeholder: str, parts: list[object]) -> None:
    text = {"type": "text", "text": f"look: {placeholder}"}
    message = refusal(omni, conversations(folder, "fine", [*parts, text]))
    assert "data.jsonl:2: placeholders do not match media" in message and placeholder in message


def test_plain_text_that_holds_a_placeholder(omni: Path) -> None:
    message = refusal(omni, [PlainText("book.txt", "before <|VIDEO|> after")])
    assert "book.txt: placeholders do not match media: 1 video placeholder tokens, but 0 video parts" in message


@pytest.mark.parametrize("placeholder", ["", "<|IMAGE|><|IMAGE|>"])
def test_template_that_writes_too_few_or_too_many_placeholders(
    omni: Path, folder: Path, tmp_path: Path, placeholder: str
) -> None:
    copy_without_template(omni, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(f"user: {placeholder}")
    message = refusal(tmp_path, conversations(folder, [IMAGE]))
    problem = (
        "refuses the conversation" if placeholder else "do not match media: 0 image placeholder tokens, but 1 image"
    )
    assert "data.jsonl:1: " in message and problem in message


def test_audio_too_short_for_a_token(omni: Path, folder: Path) -> None:
    message = refusal(omni, conversations(folder, [SHORT_AUDIO]))
    assert "data.jsonl:1: " in message and "too short" in message


def test_video_of_a_single_frame(omni: Path, folder: Path) -> None:
    part = {"type": "video_url", "video_url": {"url": "frame.mp4"}}
    (sample,) = build(omni, conversations(folder, [part]))
    assert sample.inputs["video_grid_thw"][0, 0] == 1


def test_undecodable_media_names_the_line(omni: Path, folder: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "long.wav"}}
    assert "data.jsonl:1: " in (message := refusal(omni, conversations(folder, [part]))) and "long.wav" in message


def test_sound_longer_than_the_extractors_chunk_keeps_its_end(omni: Path, folder: Path) -> None:
    minute = {"type": "audio_url", "audio_url": {"url": "minute.wav"}}
    single, pair = build(omni, conversations(folder, [minute], [AUDIO, minute, AUDIO]), max_tokens=2000)
    # 60 s: 6000 frames of 10 ms, halved twice; the tiny extractor's chunk is 10 s. 2.3 s: 57 tokens.
    assert int((single.modality == 3).sum()) == 1500
    assert int((pair.modality == 3).sum()) == 57 + 1500 + 57


def test_a_video_with_too_many_tokens_is_refused_before_its_frames_are_kept(
    omni: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Frames of 64 x 32 are scaled up: 64 tokens a pair at least. By their own size they are about 2 tokens.
    (folder / "film.webm").write_bytes(encode_video(30, 1, "webm", "libvpx-vp9"))
    film = {"type": "video_url", "video_url": {"url": "film.webm"}}
    monkeypatch.setattr(np, "stack", None)
    message = refusal(omni, conversations(folder, [film]), max_tokens=20)
    assert "data.jsonl:1: " in message and "film.webm: its 30 frames take 27 tokens or more, more than" in message


def test_the_template_gets_tools_arguments_and_keys_of_messages(llama: Path, tmp_path: Path) -> None:
    copy_without_template(llama, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ tools | tojson }} {{ thinking }} {{ messages[0].tool_calls[0].function.arguments.a }}|"
        "{{ messages[0].content }}|{{ messages[1].role }}"
    )
    call = {"function": {"name": "sum", "arguments": '{"a": 5}'}}
    record = {
        "messages": [{"role": "assistant", "tool_calls": [call]}, {"role": "developer", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "sum"}}],
        "chat_template_kwargs": {"thinking": "deep"},
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    (sample,) = build(tmp_path, load_conversations(tmp_path / "data.jsonl"))
    text = AutoTokenizer.from_pretrained(tmp_path).decode(sample.inputs["input_ids"][0])
    assert text == '[{"type": "function", "function": {"name": "sum"}}] deep 5||system'
    plain = tmp_path / "plain"
    plain.mkdir()
    copy_without_template(llama, plain)
    assert "the model has no chat template, which tools need" in refusal(
        plain, [Conversation("file:3", (Message("user", (Text("a"),)),), {"tools": []})]
    )


def test_media_are_not_cut_but_refused(omni: Path, folder: Path) -> None:
    data = conversations(folder, "fine", [AUDIO])
    length = build(omni, data)[1].modality.numel()
    assert len(build(omni, data, max_tokens=length)) == 2
    message = refusal(omni, data, max_tokens=length - 1)
    assert f"data.jsonl:2: {length} tokens with media, more than max_tokens={length - 1}; raise max_tokens" in message


def test_a_long_text_reaches_the_tokenizer_in_pieces() -> None:
    text = "".join(f"Line {number} of a long text.\n" for number in range(50))
    pieces = list(model_inputs.text_pieces(text, 100))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert list(model_inputs.text_pieces("word " * 30, 12))[:2] == ["word word ", "word word "]
    assert list(model_inputs.text_pieces("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(model_inputs.text_pieces("short")) == ["short"]


def test_windows_of_a_long_text_are_those_of_the_whole(omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(omni)
    text = PlainText("notes.txt", "".join(f"Line {number} of a long text.\n" for number in range(50)))
    whole = [list(window.token_ids) for window in model_inputs.cut_windows(text, tokenizer, 32)]
    given: list[int] = []

    def watched(piece: str, **options: object) -> object:
        given.append(len(piece))
        return tokenizer(piece, **options)

    monkeypatch.setattr(model_inputs.text_pieces, "__defaults__", (100,))
    watched.bos_token_id = tokenizer.bos_token_id  # type: ignore[attr-defined]
    assert [list(window.token_ids) for window in model_inputs.cut_windows(text, watched, 32)] == whole
    assert max(given) <= 100
