"""LoRA adapters for tests: files as PEFT writes them, and the same adapter inside a transformers model."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK, ALPHA = 4, 6
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def write_adapter(directory: Path, layers: dict[str, tuple[int, int]], targets: tuple[str, ...] = TARGETS) -> Path:
    """An adapter with random products for `targets` among `layers`: (K, N) by the source model's names.

    The values depend on the name of the directory.
    """
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(zlib.crc32(directory.name.encode()))
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        if name.endswith(targets):
            down = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = down
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) / 8
    save_file(tensors, directory / _WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none"}
    (directory / _CONFIG).write_text(json.dumps(config))
    return directory


class _Adapted(nn.Module):
    """A linear plus an adapter's product on the same input."""

    def __init__(self, linear: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.linear, self.down, self.up = linear, down, up

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T * (ALPHA / RANK)


def adapt(model: nn.Module, adapter: Path, stored_prefix: str = "") -> nn.Module:
    """`model` with the adapter of `adapter` in it; its layers are named without `stored_prefix`. In place."""
    tensors = load_file(adapter / _WEIGHTS)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        name = layer.removeprefix(_PREFIX + stored_prefix)
        up = tensors[f"{layer}.lora_B.weight"]
        model.set_submodule(name, _Adapted(model.get_submodule(name), tensors[key], up))
    return model
