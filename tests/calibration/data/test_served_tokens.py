"""Calibration samples have the tokens and media inputs that vLLM makes of the same conversations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from calibration.data.data_files import load_conversations
from tests.calibration.media_files import encode_audio, encode_video, png, sine, turned_video
from tests.calibration.rendering import build
from tests.tiny_models import build_tiny_omni, build_tiny_qwen2_5_vl, build_tiny_qwen3

# vLLM's renderer is made of a whole model directory; it needs 15 s.
pytestmark = pytest.mark.full

TOKENS = 4096
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media whose sizes need rounding, and sounds on both sides of the tiny extractor's chunk of 10 s."""
    path = tmp_path_factory.mktemp("media")
    (path / "photo.png").write_bytes(png(Image.effect_noise((613, 407), 60).convert("RGB")))
    (path / "small.png").write_bytes(png(Image.new("RGBA", (50, 31), (10, 200, 30, 90))))
    (path / "short.wav").write_bytes(encode_audio([sine(3.3, 16000, 440)], 16000, "wav", "pcm_s16le"))
    (path / "long.flac").write_bytes(encode_audio([sine(31.417, 16000, 300)] * 2, 16000, "flac", "flac"))
    (path / "clip.mp4").write_bytes(encode_video(31, 8))
    (path / "frames.mp4").write_bytes(encode_video(5, 25))
    (path / "turned.mp4").write_bytes(turned_video(1))
    return path


def part(kind: str, file: Path) -> dict[str, Any]:
    return {"type": kind, kind: {"url": file.as_uri()}}


def served(model: Path, record: dict[str, Any]) -> Any:
    """vLLM's engine input for a conversation."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import ChatParams
    from vllm.renderers.registry import renderer_from_config

    config = EngineArgs(model=str(model), allowed_local_media_path="/", max_model_len=TOKENS).create_engine_config()
    messages = record["messages"]
    arguments = {
        "add_generation_prompt": messages[-1]["role"] != "assistant",
        "tools": record.get("tools"),
        **record.get("chat_template_kwargs", {}),
    }
    _, (prompt,) = renderer_from_config(config).render_chat([messages], ChatParams(chat_template_kwargs=arguments))
    return prompt


def check(model: Path, folder: Path, *records: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Compare the token ids of every conversation with vLLM's; the samples' inputs."""
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    samples = build(model, load_conversations(path), max_tokens=TOKENS)
    for record, sample in zip(records, samples, strict=True):
        assert sample.inputs["input_ids"][0].tolist() == list(served(model, record)["prompt_token_ids"]), record
    return [sample.inputs for sample in samples]


def user(*parts: Any, **further: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts]}], **further}


def test_pictures_and_video_of_qwen2_5_vl(tmp_path: Path, folder: Path) -> None:
    model = build_tiny_qwen2_5_vl(tmp_path)
    question = {"type": "text", "text": "What is this?"}
    photo, clip = part("image_url", folder / "photo.png"), part("video_url", folder / "clip.mp4")
    records = [
        user(photo, part("image_url", folder / "small.png"), question),
        user(question, clip),
        user(part("video_url", folder / "frames.mp4")),
        {"messages": [*user(photo)["messages"], {"role": "assistant", "content": "A photo."}]},
        user(part("video_url", folder / "turned.mp4")),
    ]
    inputs = check(model, folder, *records)
    for index in (1, 4):
        theirs = served(model, records[index])["mm_kwargs"]["video"][0]
        assert torch.equal(theirs["video_grid_thw"].data, inputs[index]["video_grid_thw"][0])


def test_sounds_of_qwen2_5_omni(tmp_path: Path, folder: Path) -> None:
    model = build_tiny_omni(tmp_path)
    short, long = part("audio_url", folder / "short.wav"), part("audio_url", folder / "long.flac")
    records = [
        user(long),
        user(short, part("image_url", folder / "photo.png")),
        user(part("video_url", folder / "clip.mp4")),
    ]
    inputs = check(model, folder, *records)
    theirs = served(model, records[0])["mm_kwargs"]["audio"][0]
    ours = inputs[0]["input_features"][0]
    torch.testing.assert_close(theirs["input_audio_features"].data.float(), ours, atol=0.02, rtol=0.02)


def test_tools_calls_and_reasoning_of_qwen3(tmp_path: Path, folder: Path) -> None:
    model = build_tiny_qwen3(tmp_path)
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}:{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
        "{% endfor %}{{ message.reasoning_content }}{{ message.tool_call_id }}|{% endfor %}"
        "{{ tools | tojson if tools else '' }}{{ depth }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "1 + 2"}, {"type": "text", "text": "= ?"}]},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "c1"},
    ]
    (inputs,) = check(model, folder, {"messages": turns, "tools": TOOLS, "chat_template_kwargs": {"depth": "deep"}})
    text = AutoTokenizer.from_pretrained(model).decode(inputs["input_ids"][0])
    assert text.startswith("system:be brief|user:1 + 2\n= ?|assistant:sum{") and text.endswith("deepassistant:")
