"""Writes a generated model in a published layout: names, shapes, dtypes, files and config are the real ones'."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.calibrate.model.layouts import DECODERS, GENERATED_FILE, layout_config
from benchmarks.calibrate.model.safetensors_file import write_safetensors
from benchmarks.calibrate.model.tokenizer import write_files
from benchmarks.calibrate.model.weights import draw
from benchmarks.models.tiny_omni.config import stored_dtype, write_speakers
from benchmarks.models.tiny_omni.experts_config import separate_experts
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE

# The published files were cut so.
SHARD_SIZE = "5GB"
# Bytes of tokenizer, config and index, and of the file system's overhead.
OTHER_BYTES = 100_000_000
# A tensor of the published files; transformers now computes it, so its state dict lacks it.
INV_FREQ = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
ROPE_BASE = 10_000


def meta_tensors(layout: str, layers: int | None = None) -> dict[str, Tensor]:
    """Every tensor of the model by its published name, on the meta device, in the dtype it is published in."""
    if layout in DECODERS:
        return _meta_decoder(layout_config(layout, layers))
    config = Qwen2_5OmniConfig.from_dict(layout_config(layout, layers))
    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration(config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        shapes[INV_FREQ] = (config.token2wav_config.dit_config.head_dim // 2,)
        return {name: torch.empty(shape, dtype=stored_dtype(name)) for name, shape in shapes.items()}


def _meta_decoder(config: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(config))
        tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            parts = separate_experts(name, value) if ".mlp.experts." in name else {name: value}
            # New ones: the parts of one tensor would count as one when the files are cut.
            tensors |= {part: torch.empty(cut.shape, dtype=stored_dtype(part)) for part, cut in parts.items()}
    return tensors


def generate(
    layout: str,
    output: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model into `output`, which appears when it is complete; holds one tensor at a time.

    `layers` keeps the width but only this many decoder blocks of the thinker. Raises MorphoQuantError for an unknown
    layout, if `output` is not empty, or if the disk has too little room.
    """
    config = layout_config(layout, layers)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MorphoQuantError(f"{output}: exists and is not empty; choose another --output")
    tensors = meta_tensors(layout, layers)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + OTHER_BYTES
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise MorphoQuantError(
            f"{output}: the {layout} layout needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; make "
            "room, choose another --output, or pass --layers"
        )
    partial_output = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial_output.mkdir()
    try:
        ids = write_files(partial_output, media=layout not in DECODERS)
        _write_weights(partial_output, tensors, seed, ids["im_start"], progress)
        _write_configs(partial_output, config, ids)
        about = {"layout": layout, "decoder_blocks": layers or "all", "seed": seed}
        (partial_output / GENERATED_FILE).write_text(json.dumps(about) + "\n")
        if output.exists():
            output.rmdir()
        partial_output.rename(output)
    finally:
        shutil.rmtree(partial_output, ignore_errors=True)
    return output


def _write_weights(
    directory: Path, tensors: dict[str, Tensor], seed: int, massive_token: int, progress: Callable[[str], None]
) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    for file_name, names in split.filename_to_tensors.items():
        wanted = {name: tensors[name] for name in names}
        progress(f"{file_name}: {len(wanted)} tensors, {sum(tensor.nbytes for tensor in wanted.values()) / 1e9:.2f} GB")
        write_safetensors(directory / file_name, wanted, partial(_draw, tensors, seed, massive_token))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _draw(tensors: dict[str, Tensor], seed: int, massive_token: int, name: str) -> Tensor:
    if name == INV_FREQ:
        pairs = tensors[name].numel()
        return 1 / ROPE_BASE ** (torch.arange(pairs) / pairs)
    return draw(name, tensors[name].shape, tensors[name].dtype, seed, massive_token)


def _write_configs(directory: Path, config: dict[str, Any], ids: dict[str, int]) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    ends = [ids["im_end"], ids["end"]]
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[-1]}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if "token2wav_config" not in config:
        return
    dit = config["token2wav_config"]["dit_config"]
    write_speakers(directory, {"first_free": ids["im_start"]}, conditioning=dit["enc_emb_dim"], mel=dit["mel_dim"])
