"""Generated weights in the compared formats: the tensors of one linear, and the entries of config.json.

Random weights take as long as trained ones: no kernel's time depends on values. Weights have the variance 1/K, so
activations stay finite. N outputs, K channels, G group size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.shapes import MODELS, Linear, linears
from morphoquant_vllm.format.layers import LayerSpec, tensor_specs
from morphoquant_vllm.format.schema import QuantizationSpec

# Standard deviation of uniform integers in [-8, 7] and in [-127, 127].
INT4_DEVIATION, INT8_DEVIATION = math.sqrt((16**2 - 1) / 12), math.sqrt((255**2 - 1) / 12)
GPTQ_GROUP_SIZE = 128
# Of NVFP4: channels of one scale, deviation of random codes (each of +-0, 0.5, 1, 1.5, 2, 3, 4, 6), largest value.
NVFP4_GROUP_SIZE, NVFP4_DEVIATION, NVFP4_MAX = 16, math.sqrt(68.5 / 8), 6.0
FP8_MAX = 448.0
# Largest normalized activation that the global scale of NVFP4 inputs is made for.
NVFP4_INPUT_MAX = 10.0
# Steps of a third: most codes of a normalized input lie in [-8, 7].
ACTIVATION_STEP = 0.3
# No token is massive.
NEVER = (1e30, 2e30)

TWO_LEVEL = "-two-level"
FORMATS = (
    "bf16",
    "gptq",
    "w8a8",
    "fp8",
    "nvfp4",
    "morphoquant-g32",
    f"morphoquant-g32{TWO_LEVEL}",
    "morphoquant-g64",
    "morphoquant-g128",
)


def is_morphoquant(kind: str) -> bool:
    """Whether a format is MorphoQuant's."""
    return kind.startswith("morphoquant-")


def group_size(kind: str) -> int:
    """G of a MorphoQuant format."""
    return int(kind.removeprefix("morphoquant-g").removesuffix(TWO_LEVEL))


def scale_scheme(kind: str) -> str:
    """How a MorphoQuant format stores its scales."""
    return "two_level" if kind.endswith(TWO_LEVEL) else "group"


def tensors(kind: str, linear: Linear, generator: torch.Generator) -> dict[str, Tensor]:
    """The stored tensors of one linear by their name below it; its own bias included."""
    if kind == "bf16":
        made = {"weight": _normal(linear.outputs, linear.channels, generator)}
    elif kind == "gptq":
        made = _gptq(linear, generator)
    elif kind == "w8a8":
        made = {
            "weight": torch.randint(
                -127, 128, (linear.outputs, linear.channels), generator=generator, dtype=torch.int8
            ),
            "weight_scale": torch.full((linear.outputs, 1), linear.channels**-0.5 / INT8_DEVIATION),
        }
    elif kind == "fp8":
        # Normal values of deviation 16 use most of FP8's range.
        weight = torch.randn(linear.outputs, linear.channels, generator=generator) * 16
        made = {
            "weight": weight.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn),
            "weight_scale": torch.full((linear.outputs, 1), linear.channels**-0.5 / 16),
        }
    elif kind == "nvfp4":
        made = _nvfp4(linear, generator)
    else:
        made = _morphoquant(linear, kind, generator)
    if linear.bias:
        made["bias"] = torch.zeros(linear.outputs, dtype=torch.bfloat16)
    return made


def _normal(outputs: int, channels: int, generator: torch.Generator) -> Tensor:
    return (torch.randn(outputs, channels, generator=generator) * channels**-0.5).bfloat16()


def _gptq(linear: Linear, generator: torch.Generator) -> dict[str, Tensor]:
    """Eight codes to an int32 along K; zero points are stored less one, as AutoGPTQ writes them (8 is stored as 7)."""
    outputs, channels = linear.outputs, linear.channels
    groups = channels // GPTQ_GROUP_SIZE
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (channels // 8, outputs), generator=generator, dtype=torch.int32),
        "qzeros": torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((groups, outputs), channels**-0.5 / INT4_DEVIATION, dtype=torch.float16),
        "g_idx": torch.arange(channels, dtype=torch.int32) // GPTQ_GROUP_SIZE,
    }


def _nvfp4(linear: Linear, generator: torch.Generator) -> dict[str, Tensor]:
    """Two codes to a byte, an FP8 scale for 16 channels; global scales divide, as compressed-tensors stores them."""
    outputs, channels = linear.outputs, linear.channels
    groups = (outputs, channels // NVFP4_GROUP_SIZE)
    return {
        "weight_packed": torch.randint(0, 256, (outputs, channels // 2), generator=generator).to(torch.uint8),
        "weight_scale": torch.ones(groups).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([channels**0.5 * NVFP4_DEVIATION]),
        "input_global_scale": torch.tensor([FP8_MAX * NVFP4_MAX / NVFP4_INPUT_MAX]),
    }


def _morphoquant(linear: Linear, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors that the schema names; those of the input depend on K alone, so fused shards share them."""
    spec = specification([linear], [f"layer.{linear.name}"], kind)
    (layer,) = spec.layers.values()
    made = {
        name: torch.zeros(want.shape, dtype=want.dtype)
        for name, want in tensor_specs(layer, len(spec.rows), spec.tensor_parallel).items()
    }
    own = torch.Generator().manual_seed(linear.channels)
    made["weight_codes"].random_(0, 256, generator=generator)
    scale = linear.channels**-0.5 / INT4_DEVIATION * ACTIVATION_STEP
    if layer.scale_scheme == "two_level":
        made["weight_level"].fill_(8)
        made["weight_channel_scale"].fill_(scale / 8)
    else:
        made["weight_scale"].fill_(scale)
    made["activation_step"].fill_(ACTIVATION_STEP)
    made["gain"].fill_(1)
    made["channel_order"] = torch.randperm(linear.channels, generator=own).int()
    mask = torch.rand(made["modality_mask"].shape, generator=own) < 0.5
    mask[spec.any_row] |= mask[:-1].any(0)
    made["modality_mask"] = mask
    made["massive_channel"][:] = torch.arange(made["massive_channel"].shape[1], dtype=torch.int32)
    made["massive_low"].fill_(NEVER[0])
    made["massive_high"].fill_(NEVER[1])
    return made


def specification(layers: list[Linear], names: list[str], kind: str) -> QuantizationSpec:
    """MorphoQuant settings of `layers` under their full `names`."""
    specs = {}
    for linear, name in zip(layers, names, strict=True):
        stem = name.removesuffix(linear.name)
        specs[name] = LayerSpec(
            in_features=linear.channels,
            out_features=linear.outputs,
            group_size=group_size(kind),
            scale_scheme=scale_scheme(kind),
            parallel="column" if linear.fused else "row",
            shared_input=stem + (linear.fused or linear.name),
            bias=linear.bias,
        )
    return QuantizationSpec(layers=specs, created_by="benchmarks.serve")


def quantization_config(kind: str, model: str) -> dict[str, Any] | None:
    """quantization_config of another format's config.json; None for 16 bit."""
    if kind == "bf16":
        return None
    if kind == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GPTQ_GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    if kind == "w8a8":
        return _compressed_tensors("int-quantized", *_eight_bits("int"))
    if kind == "fp8":
        return _compressed_tensors("float-quantized", *_eight_bits("float"))
    if kind == "nvfp4":
        four = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
        return _compressed_tensors("nvfp4-pack-quantized", {**four, "dynamic": False}, {**four, "dynamic": "local"})
    raise ValueError(f"{kind} is MorphoQuant's: its settings are sealed with the weights")


def _eight_bits(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of weights with one scale per output, and of activations with one per token."""
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    return {**eight, "strategy": "channel", "dynamic": False}, {**eight, "strategy": "token", "dynamic": True}


def _compressed_tensors(storage: str, weights: dict[str, Any], activations: dict[str, Any]) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }


def model_specification(kind: str, model: str) -> QuantizationSpec:
    """MorphoQuant settings of a whole model."""
    layers, names = [], []
    for index in range(MODELS[model]["num_hidden_layers"]):
        for linear in linears(model):
            layers.append(linear)
            names.append(f"model.layers.{index}.{linear.name}")
    return specification(layers, names, kind)
