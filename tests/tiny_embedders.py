"""A tiny embedding model in sentence-transformers' layout: mean pooling, a projection, normalization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_models import DECODER, build_tiny_qwen2

# Values of a text's vector.
DIMENSIONS = 48
# Files that make the vector, beside the model.
POOLING_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
)
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}


def build_tiny_embedder(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2 with mean pooling and a projection into `directory`; return it."""
    add_pooling(build_tiny_qwen2(directory, seed))
    return directory


def add_pooling(directory: Path) -> None:
    """Write POOLING_FILES of a model whose hidden states have DECODER's size."""
    hidden = DECODER["hidden_size"]
    _write(directory / "modules.json", modules(_MODULES))
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 1024, "do_lower_case": False})
    _write(directory / "config_sentence_transformers.json", {"prompts": {"query": "Query: "}})
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
    _write(directory / "1_Pooling" / "config.json", pooling)
    identity = "torch.nn.modules.linear.Identity"
    sizes = {"in_features": hidden, "out_features": DIMENSIONS, "bias": False}
    _write(directory / "2_Dense" / "config.json", {**sizes, "activation_function": identity})
    weight = torch.randn(DIMENSIONS, hidden, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, directory / "2_Dense" / "model.safetensors")


def modules(kinds: dict[str, str]) -> list[dict[str, Any]]:
    """The content of a modules.json: sentence-transformers' classes by their folders."""
    return [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (folder, kind) in enumerate(kinds.items())
    ]


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
