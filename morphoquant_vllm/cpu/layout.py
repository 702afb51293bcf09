"""Lays out records for cpu/kernels/: each record is one block of bytes, so a call passes and checks few tensors.

Weight record      block uint8: header, codes, scale bfloat16: panels of 2 blocks of 16 outputs, the last
                   narrower, [K/8, blocks, 64] and [K/G, blocks, 16] (see gemm.h); absorbed_bias float32 [R, N].
                   With two-level scales the levels, uint8, replace scale; then follow channel_scale float32 and the
                   start values of the sums (see gemm_two_level.h) int32, both [N rounded up to 16]
                   8-bit weights have group scales, and codes in panels [K/8, blocks, 128]
Activation record  block uint8: header, then the canonical fields in another order

A header is 8 int64: a magic number, the block's size in bytes, and its dimensions. cpu/kernels/record.h compares them
with those of the tensors of each call. Each field begins at a multiple of 64 bytes. Together the records are as large
as the canonical ones, which need not be kept. This module also checks values that index others, which native code
relies on.

K input channels, N output channels, G group size along K, R modality rows, B sets of J massive intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from morphoquant_vllm.host_memory import zero_bytes
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.limits import GROUP_SIZES
from morphoquant_vllm.numerics.linear import WeightRecord
from morphoquant_vllm.numerics.weights import integer_codes

# Outputs of a block, channels in 64 bytes of a block, blocks of a panel.
BLOCK, OCTET, PANEL = 16, 8, 2
HEADER_BYTES = 64
# Tensors of a weight and an activation record, as `prepare` makes them.
WEIGHT_TENSORS, ACTIVATION_TENSORS = 2, 1
ACTIVATION_MAGIC, WEIGHT_MAGIC = 0x314143514D, 0x315457514D
# A canonical byte of two weights q = 0; what the kernels add to 8-bit weights.
_ZERO_CODES, _WIDE_ZERO = 0x88, 0x80
# Outputs repacked at a time: bounds the memory that loading needs in addition to the records.
_REPACK_OUTPUTS = 1024
_ACTIVATION_DTYPES = {
    **dict.fromkeys(("inverse", "centre", "gain", "massive_low", "massive_high"), torch.float32),
    **dict.fromkeys(("channel_order", "massive_channel"), torch.int32),
    "mask": torch.bool,
}


def prepare(weight: WeightRecord, activation: ActivationRecord) -> tuple[list[Tensor], list[Tensor]]:
    """Lay out canonical records for the kernels. Raises ValueError if they contradict each other."""
    channels, rows = activation.channel_order.numel(), activation.gain.numel()
    _check_weight(weight, channels, rows)
    _check_activation(activation, channels, rows)
    block = _weight_block(weight, channels)
    return [block, weight.absorbed_bias.contiguous()], [_activation_block(activation, channels, rows)]


def _check_weight(weight: WeightRecord, channels: int, rows: int) -> None:
    outputs, columns = weight.codes.shape
    groups = weight.scale.shape[1]
    group_size = channels // max(groups, 1)
    _require(group_size in GROUP_SIZES and groups * group_size == channels, f"K = {channels} in {groups} groups")
    wide = weight.codes.dtype is torch.int8
    _require(
        columns == channels if wide else weight.codes.dtype is torch.uint8 and columns * 2 == channels,
        "weight codes must be uint8 [N, K/2], or int8 [N, K]",
    )
    _require(not (wide and weight.two_level), "8-bit weights must have group scales")
    stored = torch.uint8 if weight.two_level else torch.bfloat16
    _require(
        weight.scale.dtype is stored and weight.scale.shape[0] == outputs,
        "scale must be bfloat16, or levels uint8, [N, K/G]",
    )
    wanted = (outputs,) if weight.two_level else (0,)
    _require(
        weight.channel_scale.dtype is torch.float32 and weight.channel_scale.shape == wanted,
        "channel_scale must be float32 [N] beside levels, [0] beside scales",
    )
    _require(
        weight.absorbed_bias.dtype is torch.float32 and weight.absorbed_bias.shape == (rows, outputs),
        f"absorbed_bias must be float32 [{rows}, {outputs}]",
    )


def _check_activation(activation: ActivationRecord, channels: int, rows: int) -> None:
    massive = activation.massive_channel.shape
    _require(len(massive) == 2, f"massive channels must be [B, J], got {list(massive)}")
    shapes = {
        **dict.fromkeys(("inverse", "centre", "mask"), (rows, channels)),
        **dict.fromkeys(("massive_channel", "massive_low", "massive_high"), tuple(massive)),
        "gain": (rows,),
        "channel_order": (channels,),
    }
    for name, dtype in _ACTIVATION_DTYPES.items():
        field: Tensor = getattr(activation, name)
        _require(field.dtype is dtype and field.shape == shapes[name], f"{name} must be {dtype} {list(shapes[name])}")
    for name in ("channel_order", "massive_channel"):
        index = getattr(activation, name)
        inside = not index.numel() or (int(index.min()) >= 0 and int(index.max()) < channels)
        _require(inside, f"{name} names a channel outside [0, {channels})")


def _weight_block(weight: WeightRecord, channels: int) -> Tensor:
    outputs, groups = weight.codes.shape[0], weight.scale.shape[1]
    wide = weight.codes.dtype is torch.int8
    blocks = -(-outputs // BLOCK)
    fields: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((blocks * channels // OCTET * (128 if wide else 64),), torch.uint8),
        ((blocks * groups * BLOCK,), weight.scale.dtype),
    ]
    if weight.two_level:
        fields += [((blocks * BLOCK,), torch.float32), ((blocks * BLOCK,), torch.int32)]
    block, (codes, scale, *per_output) = _block(
        WEIGHT_MAGIC, (channels, outputs, channels // groups, int(weight.two_level), 8 if wide else 4), fields
    )
    for first in range(0, outputs, _REPACK_OUTPUTS):
        chunk = slice(first, first + _REPACK_OUTPUTS)
        _fill_panels(codes, first, (_blocks_of_bytes if wide else _blocks_of_codes)(weight.codes[chunk]))
        _fill_panels(scale, first, _padded(weight.scale[chunk], 0).unflatten(0, (-1, BLOCK)).transpose(1, 2))
        if weight.two_level:
            channel_scale, start = (whole[:outputs][chunk] for whole in per_output)
            channel_scale.copy_(weight.channel_scale[chunk])
            # Cancels the contribution of the 128 in code + 128.
            sums = integer_codes(weight.codes[chunk]).unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)
            start.copy_(-128 * (sums * weight.scale[chunk]).sum(1, dtype=torch.int32))
    return block


def _activation_block(activation: ActivationRecord, channels: int, rows: int) -> Tensor:
    names = ("inverse", "centre", "mask", "gain", "channel_order", "massive_channel", "massive_low", "massive_high")
    order = activation.channel_order
    in_order = torch.equal(order, torch.arange(channels, dtype=order.dtype))
    if in_order:
        activation = activation._replace(channel_order=order[:0])
    fields: list[Tensor] = [getattr(activation, name) for name in names]
    sizes = (channels, rows, *activation.massive_channel.shape, int(in_order))
    block, places = _block(ACTIVATION_MAGIC, sizes, [(tuple(field.shape), field.dtype) for field in fields])
    for place, field in zip(places, fields, strict=True):
        place.copy_(field)
    return block


def _block(
    magic: int, sizes: Sequence[int], fields: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> tuple[Tensor, list[Tensor]]:
    """A block with its header, and its fields to be filled: views of the given shapes and dtypes."""
    places, end = [], HEADER_BYTES
    for shape, dtype in fields:
        places.append(slice(end, end + math.prod(shape) * dtype.itemsize))
        end = -(-places[-1].stop // 64) * 64
    block = zero_bytes(end)
    header = [magic, end, *sizes]
    block[:HEADER_BYTES].view(torch.int64)[: len(header)] = torch.tensor(header)
    return block, [block[at].view(dtype).view(shape) for at, (shape, dtype) in zip(places, fields, strict=True)]


def _blocks_of_codes(codes: Tensor) -> Tensor:
    """Repack uint8 [N, K/2] of weights.pack to uint8 [ceil(N/16), K/8, 64]; outputs past N have q = 0."""
    octets = codes.shape[1] * 2 // OCTET
    padded = _padded(codes, _ZERO_CODES)
    # [..., byte, nibble] of 8 channels: channels 0-3 become the low nibbles of four bytes, 4-7 the high ones.
    nibbles = torch.stack((padded & 0xF, padded >> 4), -1).view(-1, BLOCK, octets, 2, OCTET // 2)
    merged = nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)
    return merged.transpose(1, 2).flatten(2)


def _blocks_of_bytes(codes: Tensor) -> Tensor:
    """Repack 8-bit codes int8 [N, K] to q + 128, uint8 [ceil(N/16), K/8, 128]; outputs past N have q = 0."""
    unsigned = _padded(codes.view(torch.uint8) ^ _WIDE_ZERO, _WIDE_ZERO)
    return unsigned.view(-1, BLOCK, codes.shape[1] // OCTET, 2, OCTET // 2).permute(0, 2, 3, 1, 4).flatten(2)


def _fill_panels(panels: Tensor, first: int, blocks: Tensor) -> None:
    """Write blocks [count, depth, width] from output `first` on into panels [depth, 2, width] that begin there."""
    _, depth, width = blocks.shape
    start = first // BLOCK * depth * width
    for pair in blocks.split(PANEL):
        panels[start : start + pair.numel()].view(depth, -1, width).copy_(pair.transpose(0, 1))
        start += pair.numel()


def _padded(outputs: Tensor, value: int) -> Tensor:
    missing = -outputs.shape[0] % BLOCK
    return torch.cat((outputs, outputs.new_full((missing, outputs.shape[1]), value))) if missing else outputs


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"the CPU kernels do not take these records: {rule}")
