"""Checks of a layer when the GPU backend loads it. A refusal is one line with the layer, the rule and the remedy."""

from __future__ import annotations

import importlib.util

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu.layout import TILE_N, UNIT_K
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.limits import GROUP_SIZES
from morphoquant_vllm.numerics.linear import WeightRecord

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)
# The kernels count within one tensor in int32.
MAX_ELEMENTS = 2**31 - 1


def check_layer(name: str, weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype) -> None:
    """Raise MorphoQuantError if the kernels do not take these canonical records, or activations of `dtype`."""
    if importlib.util.find_spec("triton") is None:
        raise MorphoQuantError(f"{name}: the GPU backend needs Triton, which is not installed; pip install triton")
    if dtype not in ACTIVATION_DTYPES:
        raise MorphoQuantError(
            f"{name}: activations in {dtype} are not served on a GPU; serve with --dtype bfloat16 or --dtype float16"
        )
    if weight.codes.dtype is torch.int8:
        raise MorphoQuantError(
            f"{name}: weight_bits 8 is served on CPUs, not yet on GPUs; serve on a CPU, or calibrate again without it"
        )
    check_shape(name, weight.codes.shape[0], 2 * weight.codes.shape[1], weight.scale.shape[1])
    rows, in_features = activation.inverse.shape
    largest = max(
        rows * in_features, weight.absorbed_bias.numel(), weight.scale.shape[1] * (weight.codes.shape[0] + TILE_N)
    )
    if largest > MAX_ELEMENTS:
        raise MorphoQuantError(
            f"{name}: a table of {largest} elements is over the kernels' limit of 2^31; leave this layer in 16 bit"
        )


def check_shape(name: str, out_features: int, in_features: int, groups: int) -> None:
    """Refuse a group size, an N or a K that the kernels were not written for."""
    if groups < 1 or in_features % groups or in_features // groups not in GROUP_SIZES:
        raise MorphoQuantError(
            f"{name}: K = {in_features} in {groups} groups is not served, only groups of {list(GROUP_SIZES)}; "
            "calibrate again with one of them as --group-size"
        )
    if out_features < 1 or in_features % UNIT_K:
        raise MorphoQuantError(
            f"{name}: N = {out_features}, K = {in_features}: the matrix units need N >= 1 and K in steps of {UNIT_K}; "
            "leave this layer in 16 bit"
        )


def check_device(name: str, device: torch.device) -> None:
    """Refuse a GPU that is not in the tile table."""
    from morphoquant_vllm.gpu.device import profile_of

    try:
        profile_of(device)
    except MorphoQuantError as problem:
        raise MorphoQuantError(f"{name}: {problem}") from None
