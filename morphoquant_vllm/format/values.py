"""Checks the values of a layer's tensors: finite, positive if they divide, small enough for float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, TWO_LEVEL_SCHEME, scale_scheme_of
from morphoquant_vllm.format.schema import ANY_ROW
from morphoquant_vllm.numerics.limits import MAX_LEVEL, MAX_MAGNITUDE

# Codes lie in [-128, 127]. So do the weight codes of 8-bit weights, which are stored as int8; others lie in [-8, 7].
_LARGEST_CODE, _LARGEST_WEIGHT = 128.0, {torch.uint8: 8.0, torch.int8: 128.0}
# Elements per step of the finiteness check: they stay in the processor's cache.
_FINITE_ELEMENTS = 1 << 18

# Float dtypes that have neither NaN nor infinity.
_ALWAYS_FINITE = (torch.float4_e2m1fn_x2,)


def check_values(name: str, tensors: Mapping[str, torch.Tensor], any_row: int, *, parallel: str, blocks: int) -> None:
    """Raise MorphoQuantError naming the layer and tensor if values break a rule of the format.

    `tensors` are those of one layer, and their shapes are already checked. `blocks` is the number of equal
    K blocks in them: the checkpoint's tensor_parallel, divided by the ranks that share K.
    """
    two_level = scale_scheme_of(tensors) == TWO_LEVEL_SCHEME
    scale = "weight_channel_scale" if two_level else "weight_scale"
    finite = (scale, "activation_step", "centre", "gain", "massive_low", "massive_high", "absorbed_bias")
    for tensor in finite:
        if not bool(torch.isfinite(tensors[tensor]).all()):
            raise MorphoQuantError(f"{name}.{tensor}: holds NaN or infinite values; the file is damaged")
    for tensor in (scale, "activation_step", "gain"):
        if not bool((tensors[tensor] > 0).all()):
            raise MorphoQuantError(f"{name}.{tensor}: every value must be positive; the file is damaged")
    if two_level:
        level = tensors["weight_level"]
        if not bool(((level >= 1) & (level <= MAX_LEVEL)).all()):
            raise MorphoQuantError(f"{name}.weight_level: every level must be 1 to {MAX_LEVEL}; the file is damaged")
    _check_magnitudes(name, tensors, two_level)
    mask = tensors["modality_mask"]
    # The massive row is exempt: the quantizer recognises its tokens by value.
    if bool((mask[:-1] & ~mask[any_row]).any()):
        raise MorphoQuantError(f"{name}.modality_mask: row '{ANY_ROW}' must hold the channels of every modality's row")
    check_massive_channels(name, tensors["massive_channel"], tensors["channel_order"].numel())
    check_order(name, tensors["channel_order"], blocks if parallel == "row" else 1)


def _check_magnitudes(name: str, tensors: Mapping[str, torch.Tensor], two_level: bool) -> None:
    """Refuse values whose products overflow float32; outputs are bounded over all possible codes."""
    grid = tensors["activation_step"].double()[None] * tensors["gain"].double()[:, None]
    if float(1.0 / grid.min()) > torch.finfo(torch.float32).max:
        raise MorphoQuantError(f"{name}.activation_step: a step is too small to invert in float32")
    if float(grid.max()) > MAX_MAGNITUDE:
        raise MorphoQuantError(f"{name}.activation_step: step times gain is too large for float32; the file is damaged")
    for tensor in ("centre", "absorbed_bias"):
        if float(tensors[tensor].abs().max()) > MAX_MAGNITUDE:
            raise MorphoQuantError(f"{name}.{tensor}: a value is too large for float32; the file is damaged")
    channels = tensors["activation_step"].numel()
    if two_level:
        scale = tensors["weight_channel_scale"].double() * tensors["weight_level"].double().mean(1)
    else:
        scale = tensors["weight_scale"].double().mean(1)
    largest = _LARGEST_CODE * _LARGEST_WEIGHT[tensors["weight_codes"].dtype]
    bound = float(scale.max() * tensors["gain"].double().max()) * largest * channels
    if bound > MAX_MAGNITUDE:
        tensor = "weight_channel_scale" if two_level else "weight_scale"
        raise MorphoQuantError(f"{name}.{tensor}: a scale is too large for float32; the file is damaged")


def check_bias(name: str, bias: torch.Tensor) -> None:
    """Refuse the source layer's bias, called `name`, if a value is not finite or too large for float32."""
    if not bool(bias.isfinite().all()):
        raise MorphoQuantError(f"{name}: holds NaN or infinite values; the file is damaged")
    if float(bias.abs().max()) > MAX_MAGNITUDE:
        raise MorphoQuantError(f"{name}: a value is too large for float32; the file is damaged")


def check_finite(name: str, tensor: torch.Tensor, remedy: str) -> None:
    """Refuse NaN and infinity in a float tensor; a tensor of only zeros and infinities is a mask and passes.

    `name` and `remedy` begin and end the error's line.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype in _ALWAYS_FINITE:
        return
    # torch has `isfinite` for few of the 8-bit floats.
    flat = (tensor.float() if tensor.itemsize == 1 else tensor).reshape(-1)
    # For 16-bit floats the exponent bits are compared: an integer comparison is ten times as fast.
    exponent = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}.get(tensor.dtype)
    if exponent is None:
        finite = all(bool(chunk.isfinite().all()) for chunk in flat.split(_FINITE_ELEMENTS))
    else:
        chunks = flat.view(torch.int16).split(_FINITE_ELEMENTS)
        finite = all(int((chunk & 0x7FFF).max()) < exponent for chunk in chunks)
    if finite or bool(((flat == 0) | flat.isinf()).all()):
        return
    value = "NaN" if bool(flat.isnan().any()) else "infinity"
    raise MorphoQuantError(f"{name} holds {value}; {remedy}")


def check_massive_channels(name: str, channel: torch.Tensor, in_features: int) -> None:
    """Check that each block's massive channels [B, J] lie in that block of the K channels."""
    width = in_features // channel.shape[0]
    start = torch.arange(channel.shape[0], device=channel.device)[:, None] * width
    if bool(((channel < start) | (channel >= start + width)).any()):
        raise MorphoQuantError(f"{name}.massive_channel: a channel lies outside its block of {width} channels")


def check_order(name: str, order: torch.Tensor, blocks: int) -> None:
    """Check that the channel order [K] is a permutation within each of `blocks` equal blocks."""
    expected = torch.arange(order.numel(), device=order.device).view(blocks, -1)
    if not torch.equal(order.long().view(blocks, -1).sort(dim=1).values, expected):
        within = f"within {blocks} tensor-parallel blocks " if blocks > 1 else ""
        raise MorphoQuantError(f"{name}.channel_order: must permute the {order.numel()} channels {within}exactly once")


def unequal_input_tensors(
    reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: Sequence[str] = INPUT_TENSORS
) -> list[str]:
    """Names of the shared-input tensors that differ between two shards of a fused layer."""
    return [name for name in names if not torch.equal(reference[name], other[name])]
