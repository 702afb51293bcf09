"""A checkpoint whose image tower is quantized too, made with the numerics alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE, read_spec
from morphoquant_vllm.format.files import read_json
from morphoquant_vllm.format.layers import LayerSpec, stored_name
from tests.checkpoints import edit_tensors, file_of, random_group, seal_again

# The tower's linears by the input that they share; mlp.down_proj stays in 16 bit, as on the published models.
SHARED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.proj": ("attn.proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def write_quantized_tower(
    source: Path,
    target: Path,
    blocks: int,
    prefix: str = "thinker.visual.blocks",
    shared: Mapping[str, tuple[str, ...]] = SHARED,
) -> list[str]:
    """Copy a checkpoint of a Qwen2.5-Omni to `target` and quantize its image tower; the names of the new layers.

    `prefix` and `shared` name blocks and linears of another tower. Steps, centres, gains and masks are random: what is
    served must be what the numerics define, however coarse.
    """
    shutil.copytree(source, target)
    spec = read_spec(target)
    layers: dict[str, LayerSpec] = {}
    changes: dict[str, Tensor | None] = {}
    for block in range(blocks):
        for fused, names in shared.items():
            full = [f"{prefix}.{block}.{name}" for name in names]
            matrices = [_tensor(target, f"{name}.weight").float() for name in full]
            layer = LayerSpec(
                in_features=matrices[0].shape[1],
                out_features=matrices[0].shape[0],
                group_size=32,
                parallel="row" if fused == "attn.proj" else "column",
                shared_input=f"{prefix}.{block}.{fused}",
                bias=True,
                fixed_row="image",
            )
            seed = torch.tensor(block * len(shared) + list(shared).index(fused))
            for name, tensors in zip(full, random_group(matrices, layer, spec, seed), strict=True):
                layers[name] = layer
                changes[f"{name}.weight"] = None
                changes |= {stored_name(name, tensor): value for tensor, value in tensors.items()}
    file = file_of(target, f"{full[0]}.weight")
    edit_tensors(file, changes)
    index = read_json(target / INDEX_FILE)
    for name, value in changes.items():
        if value is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file.name
    (target / INDEX_FILE).write_text(json.dumps(index))
    config = read_json(target / CONFIG_FILE)
    config["quantization_config"] = replace(spec, layers={**spec.layers, **layers}).to_dict()
    (target / CONFIG_FILE).write_text(json.dumps(config))
    seal_again(target)
    return list(layers)


def _tensor(directory: Path, name: str) -> Tensor:
    with safe_open(str(file_of(directory, name)), "pt") as file:
        return file.get_tensor(name)
