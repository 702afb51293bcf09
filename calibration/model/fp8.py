"""FP8 source models: which are read, and their weights as 16 bit. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Their names in safetensors headers.
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# Endings of a weight's scale beside the weight: of block-wise FP8, and of compressed-tensors and older FP8 files.
_SCALES = ("_scale_inv", "_scale")
# Endings of tensors that only an FP8 server uses: scales of activations and of the key-value cache.
_SERVING_ONLY = (
    *(".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".prob_output_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale"),
)
_CONFIG_KEYS = ("quantization_config", "compression_config")


def quantization_configs(config: Mapping[str, Any]) -> Iterator[Any]:
    """The settings of quantization in a config.json, at any depth, that are not empty."""
    for key, value in config.items():
        if key in _CONFIG_KEYS:
            if value:
                yield value
        elif isinstance(value, Mapping):
            yield from quantization_configs(value)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its settings of quantization, at any depth. Empty ones stay."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS or not value
    }


def fp8_scheme(settings: Any) -> str | None:
    """The kind of FP8 in words, for example "block-wise FP8"; None if the settings are not of FP8 weights."""
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        return "block-wise FP8" if settings.get("weight_block_size") else "FP8"
    if method == "fbgemm_fp8":
        return "FP8"
    groups = settings.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, Mapping) and groups:
        weights = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
        if all(isinstance(one, Mapping) and (one.get("type"), one.get("num_bits")) == ("float", 8) for one in weights):
            return "FP8 of compressed-tensors"
    return None


def block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, of block-wise FP8; None if a scale belongs to a row or a tensor."""
    size = settings.get("weight_block_size")
    if size is None:
        for group in (settings.get("config_groups") or {}).values():
            size = size or group["weights"].get("block_structure")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return size[0], size[1]
    return None


def scale_names(weight: str) -> tuple[str, ...]:
    """Names that the scale of a weight may have in the files."""
    return tuple(f"{weight}{ending}" for ending in _SCALES)


def is_serving_only(name: str) -> bool:
    """Whether a tensor serves FP8 arithmetic alone."""
    return name.endswith(_SERVING_ONLY)


def scale_fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether a scale of this shape belongs to a weight [N, K]: one for the tensor, for each row, or for each block."""
    if scale in ((), (1,)) or len(weight) != 2:
        return scale in ((), (1,))
    rows, columns = weight
    blocks = (-(-rows // block[0]), -(-columns // block[1])) if block else None
    return scale in ((rows,), (rows, 1), (1, 1), blocks)


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The weight in bfloat16, from float8 [N, K] and its scale, as in `scale_fits`."""
    factor = scale.float()
    if factor.dim() == 1 and factor.numel() > 1:
        factor = factor[:, None]
    if factor.numel() > 1 and factor.shape != (weight.shape[0], 1):
        assert block is not None
        for dimension, side in enumerate(block):
            factor = factor.repeat_interleave(side, dimension)
        factor = factor[: weight.shape[0], : weight.shape[1]]
    return (weight.float() * factor).to(torch.bfloat16)
