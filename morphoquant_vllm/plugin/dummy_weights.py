"""Values of a layer that vLLM's `--load-format dummy` does not load: valid ones, to profile time and memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a weight's scale: outputs stay of the size of the inputs.
_SCALE = 1e-3
_ONES = ("activation_step", "gain", "massive_low", "weight_level")
_ZEROS = ("centre", "massive_high", "modality_mask", "absorbed_bias")


def fill(tensors: dict[str, Tensor]) -> None:
    """Write valid values into one rank's tensors of a layer, by the format's names. No token is massive."""
    for name in tensors.keys() & {*_ONES, *_ZEROS}:
        tensors[name].fill_(int(name in _ONES))
    for name in tensors.keys() & {"weight_scale", "weight_channel_scale"}:
        tensors[name].fill_(_SCALE)
    codes, order, massive = tensors["weight_codes"], tensors["channel_order"], tensors["massive_channel"]
    lowest = torch.iinfo(codes.dtype).min
    codes.random_(lowest, lowest + 256, generator=torch.Generator(codes.device).manual_seed(0))
    order.copy_(torch.arange(order.numel()))
    blocks = massive.shape[0]
    massive.copy_((torch.arange(blocks) * (order.numel() // blocks))[:, None].expand_as(massive))
