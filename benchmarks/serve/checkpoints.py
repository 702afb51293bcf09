"""Checkpoints of generated weights at real shapes, which vLLM loads as it loads published ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common.files import weight_bytes
from benchmarks.models.shapes import MODELS, linears
from benchmarks.models.tiny_omni.processor import write_tokenizer
from benchmarks.serve import formats
from morphoquant_vllm.format.seal import sealed


def write_checkpoint(model: str, kind: str, work: Path) -> Path:
    """Write `model` in a format to WORK/MODEL-FORMAT unless it is there; return the directory.

    Every decoder layer gets the same values, drawn once; they are stored, loaded and held once for each layer.
    """
    directory = work / f"{model}-{kind}"
    if (directory / "config.json").is_file():
        return directory
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ids = write_tokenizer(partial, "text")
    _write_weights(partial, model, kind)
    _write_config(partial, model, kind, ids)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def _write_weights(directory: Path, model: str, kind: str) -> None:
    config = MODELS[model]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    layer = {
        f"{linear.name}.{name}": tensor
        for linear in linears(model)
        for name, tensor in formats.tensors(kind, linear, generator).items()
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    layer |= {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
    index: dict[str, str] = {}
    for number in range(config["num_hidden_layers"]):
        _save(directory, f"layer-{number:02d}", {f"model.layers.{number}.{n}": t for n, t in layer.items()}, index)
    around = {"model.norm.weight": ones, "model.embed_tokens.weight": _rows(vocabulary, hidden, 1.0, generator)}
    if not config["tie_word_embeddings"]:
        around["lm_head.weight"] = _rows(vocabulary, hidden, hidden**-0.5, generator)
    _save(directory, "embeddings", around, index)
    size = weight_bytes(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1) + "\n"
    )


def _rows(rows: int, columns: int, deviation: float, generator: torch.Generator) -> Tensor:
    """Normal bfloat16 [rows, columns], drawn in parts: float32 of an embedding would take twice its memory."""
    made = torch.empty(rows, columns, dtype=torch.bfloat16)
    for part in made.split(8192):
        part.copy_(torch.randn(part.shape, generator=generator) * deviation)
    return made


def _save(directory: Path, stem: str, tensors: dict[str, Tensor], index: dict[str, str]) -> None:
    file = f"model-{stem}.safetensors"
    save_file(tensors, directory / file, metadata={"format": "pt"})
    index |= dict.fromkeys(tensors, file)


def _write_config(directory: Path, model: str, kind: str, ids: dict[str, int]) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(
        **MODELS[model],
        architectures=["Qwen2ForCausalLM"],
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=ids["end"],
        eos_token_id=ids["im_end"],
        dtype=torch.bfloat16,
    ).to_dict()
    quantization: dict[str, Any] | None
    if formats.is_morphoquant(kind):
        # The content of the file, with names of dtypes.
        config = json.loads(json.dumps(config))
        quantization = sealed(directory, config, formats.model_specification(kind, model)).to_dict()
    else:
        quantization = formats.quantization_config(kind, model)
    if quantization is not None:
        config["quantization_config"] = quantization
    # Last: its presence says that the directory is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
