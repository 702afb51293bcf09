"""Models in FP8 as they are published, made of 16-bit ones, for tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Neither side divides all sizes of the tiny models.
BLOCK = (48, 40)
BLOCK_WISE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
CHANNEL_WISE = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}
TENSOR_WISE = {"quant_method": "fp8", "activation_scheme": "static"}


def block_wise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes float8 [N, K], scale float32 of each block, and the weight in bfloat16 that they stand for."""
    codes, served = weight.to(torch.float8_e4m3fn), torch.empty(weight.shape, dtype=torch.bfloat16)
    (rows, columns), (n, k) = BLOCK, weight.shape
    scale = torch.empty(-(-n // rows), -(-k // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].abs().max().float() / 448
            codes[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
            served[part] = (codes[part].float() * scale[i, j]).bfloat16()
    return codes, scale, served


def channel_wise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `block_wise`, with a scale bfloat16 [N, 1] for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, (codes.float() * scale.float()).bfloat16()


def tensor_wise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `block_wise`, with one scale float32 []."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return codes, scale, (codes.float() * scale).bfloat16()


def write_fp8(model: Path, fp8: Path, plain: Path, settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Write the linears of `model` whose names hold one of `parts` as FP8 to `fp8`, and as bfloat16 to `plain`."""
    ending = "weight_scale_inv" if "weight_block_size" in settings else "weight_scale"
    convert: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = (
        block_wise if settings is BLOCK_WISE else channel_wise if settings is CHANNEL_WISE else tensor_wise
    )
    for target in (fp8, plain):
        shutil.copytree(model, target)
    config = json.loads((model / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    weight_map = {}
    for file in sorted(model.glob("*.safetensors")):
        scaled, served = {}, {}
        for name, value in load_file(file).items():
            scaled[name] = served[name] = value
            if name.endswith(".weight") and value.dim() == 2 and any(part in name for part in parts):
                scaled[name], scale, served[name] = convert(value)
                scaled[name.removesuffix("weight") + ending] = scale
                if settings is TENSOR_WISE:
                    scaled[name.removesuffix("weight") + "input_scale"] = torch.ones(())
        save_file(scaled, fp8 / file.name, metadata={"format": "pt"})
        save_file(served, plain / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(scaled, file.name)
    index = fp8 / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
