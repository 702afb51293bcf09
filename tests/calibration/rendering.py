"""Rendering of test data with a tiny model's processor, for the tests of this folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoProcessor

from calibration.data.conversations import Conversation, PlainText
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, build_samples
from morphoquant_vllm.errors import MorphoQuantError

ROWS = ("text", "image", "video", "audio", "any")


def conversations(folder: Path, *contents: object) -> list[Conversation | PlainText]:
    """One user turn a line."""
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents]
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return load_conversations(path)


def placeholders(model: Path) -> dict[str, list[int]]:
    config = json.loads((model / "config.json").read_text())
    config = config.get("thinker_config", config)
    keys = {kind: (f"{kind}_token_id", f"{kind}_token_index") for kind in ("image", "video", "audio")}
    return {
        kind: [config[key] for key in names if key in config][:1]
        for kind, names in keys.items()
        if any(key in config for key in names)
    }


def build(
    model: Path,
    data: Sequence[Conversation | PlainText],
    max_tokens: int = 1024,
    max_samples: int | None = None,
    rows: Sequence[str] = ROWS,
    window_tokens: int | None = None,
    skip_bad: bool = False,
) -> list[Sample]:
    ids = placeholders(model)
    return build_samples(
        model,
        data,
        max_tokens=max_tokens,
        max_samples=max_samples,
        window_tokens=window_tokens,
        placeholder_token_ids=ids,
        rows=rows,
        skip_bad=skip_bad,
    )


def refusal(
    model: Path, data: Sequence[Conversation | PlainText], max_tokens: int = 1024, max_samples: int | None = None
) -> str:
    """The one line with which the data is refused."""
    with pytest.raises(MorphoQuantError) as caught:
        build(model, data, max_tokens, max_samples)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy_without_template(model: Path, target: Path) -> None:
    """Copy a model's small files, without its chat template."""
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        if (model / name).exists():
            (target / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    assert not AutoProcessor.from_pretrained(target).chat_template
