"""The CPU backend: records as cpu_kernels/ reads them, and checked calls of the compiled functions.

Weight record      codes uint8 [ceil(N/16), K/8, 64] (see cpu_kernels/gemm.h), scale bfloat16 [ceil(N/16), K/G, 16],
                   absorbed_bias float32 [R, N]: as large as the canonical one, which need not be kept
Activation record  the canonical one

M tokens, K input channels, N output channels, G group size along K, R modality rows. Everything that native code
relies on is checked here: values of records when they are prepared, dtypes and shapes at each call. The modality of
each token is checked by the kernel.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .cpu_build import Kernels, kernels
from .numerics.activation import ActivationRecord
from .numerics.linear import WeightRecord
from .schema import GROUP_SIZES

# Outputs side by side, and channels in each of their rows of 64 bytes.
BLOCK, OCTET = 16, 8
# Two canonical bytes of q = 0.
_ZERO_CODES = 0x88
# Outputs repacked at a time: bounds what loading needs besides the records themselves.
_REPACK_OUTPUTS = 1024
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The fields of Call in cpu_kernels/call.h.
_CALL = struct.Struct("=29q")
# Of the activation record's fields, in order.
_ACTIVATION_DTYPES = (
    *(torch.float32, torch.float32, torch.bool, torch.float32, torch.int32),  # inverse ... channel_order
    *(torch.int32, torch.float32, torch.float32),  # massive_channel, _low, _high
)


def available() -> bool:
    """Whether the kernels run here; builds them at the first call, and warns once where they do not."""
    return kernels() is not None


def prepare(weight: WeightRecord, activation: ActivationRecord) -> tuple[list[Tensor], list[Tensor]]:
    """Lay canonical records out for the kernels. Raises ValueError where they contradict each other."""
    outputs, half = weight.codes.shape
    channels = activation.channel_order.numel()
    groups = weight.scale.shape[1]
    group_size = channels // max(groups, 1)
    _require(group_size in GROUP_SIZES and groups * group_size == channels, f"K = {channels} in {groups} groups")
    _require(weight.codes.dtype is torch.uint8 and half * 2 == channels, "weight codes must be uint8 [N, K/2]")
    _require(
        weight.scale.dtype is torch.bfloat16 and weight.scale.shape[0] == outputs, "scale must be bfloat16 [N, K/G]"
    )
    for name in ("channel_order", "massive_channel"):
        index = getattr(activation, name)
        inside = not index.numel() or (int(index.min()) >= 0 and int(index.max()) < channels)
        _require(inside, f"{name} names a channel outside [0, {channels})")
    records = (
        [
            repack_codes(weight.codes),
            repack_scale(weight.scale),
            weight.absorbed_bias.contiguous(),
        ],
        [part.contiguous() for part in activation],
    )
    _check_activation(records[1], channels)
    _check_weight(records[0], channels, activation.gain.numel())
    return records


def repack_codes(codes: Tensor) -> Tensor:
    """uint8 [N, K/2], as weights.pack makes them -> uint8 [ceil(N/16), K/8, 64]; outputs past N have q = 0."""
    outputs, half = codes.shape
    blocks, octets = -(-outputs // BLOCK), half * 2 // OCTET
    packed = codes.new_empty((blocks, octets, BLOCK * OCTET // 2))
    for first in range(0, outputs, _REPACK_OUTPUTS):
        part = _padded(codes[first : first + _REPACK_OUTPUTS], _ZERO_CODES)
        # [..., byte, nibble] of 8 channels: channels 0-3 become the low nibbles of four bytes, 4-7 the high ones.
        nibbles = torch.stack((part & 0xF, part >> 4), -1).view(-1, BLOCK, octets, 2, OCTET // 2)
        merged = nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)
        start = first // BLOCK
        packed[start : start + merged.shape[0]] = merged.transpose(1, 2).flatten(2)
    return packed


def repack_scale(scale: Tensor) -> Tensor:
    """bfloat16 [N, K/G] -> [ceil(N/16), K/G, 16]; 0 for outputs past N."""
    return _padded(scale, 0).unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def _padded(rows: Tensor, value: int) -> Tensor:
    missing = -rows.shape[0] % BLOCK
    return torch.cat((rows, rows.new_full((missing, rows.shape[1]), value))) if missing else rows


def act_quant(x: Tensor, modality: Tensor, activation: list[Tensor], library: Kernels | None = None) -> Tensor:
    """Codes int8 [M, K]; as ops.act_quant. Raises ValueError for records or inputs of another layout."""
    x, modality = _check_input(x, modality, activation)
    tokens, channels = x.shape
    codes = x.new_empty((tokens, channels), dtype=torch.int8)
    token_row = x.new_empty((tokens,), dtype=torch.int32)
    if tokens:
        call = _CALL.pack(
            *_input_fields(x, modality, activation),
            codes.data_ptr(),
            token_row.data_ptr(),
            0,
            torch.get_num_threads(),
            *(0,) * 8,
        )
        _finish((library or _loaded()).act_quant(call), len(activation[3]))
    return codes


def linear(
    x: Tensor,
    modality: Tensor,
    weight: list[Tensor],
    activation: list[Tensor],
    bias: Tensor | None,
    library: Kernels | None = None,
) -> Tensor:
    """y [M, N] in the dtype of x; as ops.linear. Raises ValueError for records or inputs of another layout."""
    x, modality = _check_input(x, modality, activation)
    tokens, channels = x.shape
    groups = _check_weight(weight, channels, activation[3].numel())
    codes, scale, absorbed_bias = weight
    outputs = absorbed_bias.shape[1]
    bias_fields = (0, 0)
    if bias is not None:
        if bias.dtype not in _DTYPES or bias.shape != (outputs,) or bias.device.type != "cpu":
            raise ValueError(f"bias must be a float [{outputs}] on the CPU, got {bias.dtype} {list(bias.shape)}")
        bias = bias.contiguous()
        bias_fields = (bias.data_ptr(), _DTYPES[bias.dtype])
    y = x.new_empty((tokens, outputs))
    if tokens:
        # Codes, then rows and group offsets, 4 bytes each: K is a multiple of 32, so that these are aligned.
        workspace = torch.empty(tokens * (channels + 4 + 4 * groups), dtype=torch.uint8)
        start = workspace.data_ptr()
        call = _CALL.pack(
            *_input_fields(x, modality, activation),
            start,
            start + tokens * channels,
            start + tokens * (channels + 4),
            torch.get_num_threads(),
            codes.data_ptr(),
            scale.data_ptr(),
            absorbed_bias.data_ptr(),
            *bias_fields,
            outputs,
            channels // groups,
            y.data_ptr(),
        )
        _finish((library or _loaded()).linear(call), absorbed_bias.shape[0])
    return y


def _loaded() -> Kernels:
    library = kernels()
    if library is None:
        raise RuntimeError("the CPU kernels do not run on this machine; use the backend 'reference'")
    if library.call_size != _CALL.size:
        raise RuntimeError("cpu.py does not belong to these cpu_kernels; install the package again")
    return library


def _finish(status: int, rows: int) -> None:
    if status:
        raise IndexError(f"modality names a row outside [0, {rows})")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the CPU kernels do not take these records: {what}")


def _input_fields(x: Tensor, modality: Tensor, activation: list[Tensor]) -> tuple[int, ...]:
    inverse, centre, mask, gain, order, massive_channel, low, high = activation
    tokens, channels = x.shape
    sets, each = massive_channel.shape
    return (
        x.data_ptr(),
        x.stride(0),
        _DTYPES[x.dtype],
        tokens,
        channels,
        modality.data_ptr(),
        inverse.data_ptr(),
        centre.data_ptr(),
        mask.data_ptr(),
        gain.data_ptr(),
        gain.numel(),
        order.data_ptr(),
        massive_channel.data_ptr(),
        low.data_ptr(),
        high.data_ptr(),
        sets,
        each,
    )


def _check_input(x: Tensor, modality: Tensor, activation: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x with adjacent channels and modality without gaps, after checks of both and of the activation record."""
    if x.dtype not in _DTYPES or x.device.type != "cpu" or modality.device.type != "cpu":
        raise ValueError(f"x must be float32, bfloat16 or float16 on the CPU, got {x.dtype} on {x.device}")
    _check_activation(activation, x.shape[1])
    return x if x.stride(1) == 1 else x.contiguous(), modality.contiguous()


def _check_activation(activation: list[Tensor], channels: int) -> None:
    if len(activation) != len(_ACTIVATION_DTYPES):
        raise ValueError(f"the activation record must have {len(_ACTIVATION_DTYPES)} tensors, got {len(activation)}")
    order, massive = activation[4], activation[5].shape
    if order.numel() != channels or channels % GROUP_SIZES[0]:
        raise ValueError(f"act_quant needs x as [M, {order.numel()}], a multiple of 32; got K = {channels}")
    per_row = (activation[3].numel(), channels)
    shapes = (per_row, per_row, per_row, per_row[:1], (channels,), massive, massive, massive)
    for part, dtype, shape in zip(activation, _ACTIVATION_DTYPES, shapes, strict=True):
        if part.dtype is not dtype or part.shape != shape or not part.is_contiguous() or not part.is_cpu:
            raise ValueError(f"the activation record must hold {dtype} {list(shape)}, got {part.dtype} {part.shape}")
    if len(massive) != 2:
        raise ValueError(f"massive channels must be [B, J], got {list(massive)}")


def _check_weight(weight: list[Tensor], channels: int, rows: int) -> int:
    """Groups along K, after checks of the weight record."""
    if len(weight) != 3:
        raise ValueError(f"the weight record must have 3 tensors, got {len(weight)}")
    codes, scale, absorbed_bias = weight
    if absorbed_bias.dim() != 2 or absorbed_bias.shape[0] != rows or absorbed_bias.dtype is not torch.float32:
        raise ValueError(f"absorbed_bias must be float32 [{rows}, N]")
    blocks = -(-absorbed_bias.shape[1] // BLOCK)
    if codes.shape != (blocks, channels // OCTET, 64) or codes.dtype is not torch.uint8:
        raise ValueError(f"weight codes must be uint8 [{blocks}, {channels // OCTET}, 64], got {list(codes.shape)}")
    groups = scale.shape[1] if scale.dim() == 3 else 0
    if (
        scale.dtype is not torch.bfloat16
        or scale.shape != (blocks, groups, BLOCK)
        or not groups
        or channels % groups
        or channels // groups not in GROUP_SIZES
    ):
        raise ValueError(f"scale must be bfloat16 [{blocks}, K/G, {BLOCK}], got {scale.dtype} {list(scale.shape)}")
    if not all(part.is_contiguous() and part.is_cpu for part in weight):
        raise ValueError("the weight record must be contiguous and on the CPU")
    return groups
