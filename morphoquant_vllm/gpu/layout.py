"""Layout of a layer's records in GPU memory. Torch only; each tensor is laid out once, after loading.

Weights are tiles [N/128, K/P, 128, P/2]: a program reads whole tiles one after the other. P = max(G, 64) channels share
a tile:

    a tile: 128 output channels, P channels of K        byte p of a row         its operands
    row 0    | byte 0 | byte 1 | ... | byte P/2 - 1 |   | high   | low    |     low:  channels 0 to P/2 - 1
    row 1    | byte 0 | byte 1 | ... | byte P/2 - 1 |   | k =    | k =    |     high: channels P/2 to P - 1
    ...                                                 | p + P/2| p      |
    row 127  | byte 0 | byte 1 | ... | byte P/2 - 1 |     4 bit    4 bit

Nibbles are two's complement. Each half is one operand of the int8 matrix units, which take 32 channels at a time. The
halves are those of one group at G = 64 and 128, and two groups at G = 32. N is rounded up to 128 and K to P with
weights of 0.

A nibble unpacked in place is 16 * q. The gain is stored divided by 16.

Scales take 32 bits for each tile and output channel, wide enough for an asynchronous copy. At G = 32 the lower 16 bits
hold the bfloat16 scale of the low nibbles, the upper ones that of the high nibbles. At G = 64 and 128 the one scale is
float32. A single bfloat16 is too narrow: on an H100 each turn of the loop then waited for memory.

With two-level scales P is 64, and nibbles are q + 8. K is rounded up to 2P with levels of 0, which make any weight 0.
A word of 32 bits holds the levels of two tiles, one for each half of a tile:

    bits    31 .. 24      23 .. 16      15 .. 8       7 .. 0         a level is there
            high nibbles  low nibbles   high nibbles  low nibbles    once at G = 32, twice at 64,
            tile 2t + 1   tile 2t + 1   tile 2t       tile 2t        four times at 128

Channel scales are multiplied by 16, because the gain is divided by 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from morphoquant_vllm.numerics.activation import CODE_MAX, ESCAPE_MAX, ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord
from morphoquant_vllm.numerics.weights import INT4_MIN, unpack

TILE_N = 128
# Channels of K that one instruction of the int8 matrix units multiplies.
UNIT_K = 32
# Output channels repacked at a time: loading a layer needs little more memory than its packed codes.
REPACK_OUTPUTS = 4096


class GpuWeight(NamedTuple):
    """A weight record in the kernels' layout; the last tensor is absorbed_bias, as ops.py requires."""

    codes: Tensor  # uint8 [N/128, K/P, 128, P/2]
    # Both sizes are rounded up. G = 32: pairs of bfloat16 as int32 [K/P, N]. G = 64 or 128: float32 [K/P, N].
    # Two-level: words of levels, int32 [K/2P, N].
    scale: Tensor
    channel_scale: Tensor  # float32 [N], times 16; [0] without two-level scales
    absorbed_bias: Tensor  # float32 [R, N]

    @property
    def two_level(self) -> bool:
        """Whether the layer has two-level scales."""
        return self.channel_scale.numel() > 0


class GpuActivation(NamedTuple):
    """An activation record in the kernels' layout."""

    inverse: Tensor  # float32 [R, K]
    centre: Tensor  # float32 [R, K]
    limit: Tensor  # int8 [R, K]: 127 if a code may escape, else 7
    gain: Tensor  # float32 [R], divided by 16
    channel_order: Tensor  # int32 [K]; [0] if channels come in channel order
    massive_channel: Tensor  # int32 [B, J], both rounded up to powers of two
    massive_low: Tensor  # float32 [B, J]
    massive_high: Tensor  # float32 [B, J]

    @property
    def in_features(self) -> int:
        """K."""
        return self.centre.shape[1]

    @property
    def in_order(self) -> bool:
        """Whether the channels of the input come in channel order."""
        return not self.channel_order.numel()


def tile_channels(group_size: int, two_level: bool = False) -> int:
    """P, the channels that one tile holds along K."""
    return 2 * UNIT_K if two_level else max(group_size, 2 * UNIT_K)


def group_size_of(weight: GpuWeight) -> int:
    """G, from the shapes; for two-level scales the smallest, since their layout does not depend on it."""
    if weight.two_level:
        return UNIT_K
    channels = 2 * weight.codes.shape[3]
    return channels if weight.scale.dtype is torch.float32 else channels // 2


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _tiles(packed: Tensor, channels: int, k_tiles: int, zero: int) -> Tensor:
    """Canonical bytes uint8 [N, K/2], N a multiple of 128, as tiles uint8 [N/128, K/P, 128, P/2].

    There are `k_tiles` tiles along K. The nibble of a weight 0 is `zero`.
    """
    codes = unpack(packed) + zero
    codes = pad(codes, (0, k_tiles * channels - codes.shape[1]))
    nibbles = (codes.view(-1, TILE_N, k_tiles, 2, channels // 2) & 0xF).to(torch.uint8)
    low, high = nibbles.unbind(3)
    return (low | (high << 4)).transpose(1, 2).contiguous()


def prepare_weight(weight: WeightRecord) -> GpuWeight:
    """Lay a canonical record out as described above, on the record's device."""
    outputs, half = weight.codes.shape
    group_size = 2 * half // weight.scale.shape[1]
    channels = tile_channels(group_size, weight.two_level)
    k_tiles = _round_up(2 * half, channels * (1 + weight.two_level)) // channels
    padded = _round_up(outputs, TILE_N)
    tiles = weight.codes.new_empty((padded // TILE_N, k_tiles, TILE_N, channels // 2))
    zero = -INT4_MIN if weight.two_level else 0
    for start in range(0, padded, REPACK_OUTPUTS):
        part = weight.codes[start : start + REPACK_OUTPUTS]
        # 0x88 is a pair of weights 0.
        part = pad(part, (0, 0, 0, _round_up(part.shape[0], TILE_N) - part.shape[0]), value=0x88)
        tiles[start // TILE_N : (start + part.shape[0]) // TILE_N] = _tiles(part, channels, k_tiles, zero)
    scale = _words(weight.scale, group_size) if weight.two_level else scale_words(weight.scale, group_size)
    rounded_up = k_tiles // 2 if weight.two_level else k_tiles
    scale = pad(scale, (0, rounded_up - scale.shape[1], 0, padded - outputs)).T.contiguous()
    return GpuWeight(tiles, scale, weight.channel_scale * 16, weight.absorbed_bias.contiguous())


def scale_words(scale: Tensor, group_size: int) -> Tensor:
    """Scales bfloat16 [N, K/G] as 32 bits for each tile along K: pairs as int32, or float32; see the module."""
    if group_size == tile_channels(group_size):
        return scale.float()
    bits = pad(scale, (0, -scale.shape[1] % 2)).view(torch.int16).int()
    return bits[:, 0::2] & 0xFFFF | bits[:, 1::2] << 16


def _words(level: Tensor, group_size: int) -> Tensor:
    """Levels uint8 [N, K/G] as words int32 [N, ceil(K/2P)]: a byte for each 32 channels, the first one lowest."""
    halves = level.repeat_interleave(group_size // UNIT_K, dim=1)
    halves = pad(halves, (0, -halves.shape[1] % 4)).unflatten(1, (-1, 4)).int()
    first, second, third, fourth = halves.unbind(2)
    return first | second << 8 | third << 16 | fourth << 24


def prepare_activation(activation: ActivationRecord) -> GpuActivation:
    """Lay an activation record out: mask as limits, gain divided by 16, an empty order if channels are in order.

    Sets of massive intervals are filled up to powers of two with intervals that hold nothing.
    """
    blocks, intervals = activation.massive_channel.shape
    order = activation.channel_order
    in_order = torch.equal(order, torch.arange(order.numel(), dtype=order.dtype, device=order.device))
    # Triton's blocks are powers of two. Additional intervals of a set repeat its last one; additional sets are empty.
    wide = _power_of_two(intervals) - intervals
    tall = _power_of_two(blocks) - blocks

    def fill(values: Tensor, empty: float) -> Tensor:
        values = torch.cat((values, values[:, -1:].expand(-1, wide)), 1)
        return torch.cat((values, values.new_full((tall, values.shape[1]), empty))).contiguous()

    return GpuActivation(
        inverse=activation.inverse,
        centre=activation.centre,
        limit=torch.where(activation.mask, ESCAPE_MAX, CODE_MAX).to(torch.int8),
        gain=activation.gain / 16,
        channel_order=order.new_empty(0) if in_order else order,
        massive_channel=fill(activation.massive_channel, 0),
        massive_low=fill(activation.massive_low, 1.0),
        massive_high=fill(activation.massive_high, 0.0),
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
