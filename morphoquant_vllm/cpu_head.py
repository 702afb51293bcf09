"""The 8-bit lm_head on a CPU: checked calls of the compiled function (cpu_kernels/head.h).

M tokens, K channels, N outputs. Everything that native code relies on is checked at each call.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .cpu_build import Kernels, kernels

# K must be a multiple of what one vector holds on any of the instruction sets.
CHANNEL_MULTIPLE = 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The fields of HeadCall in cpu_kernels/head.h.
_CALL = struct.Struct("=11q")


def head(x: Tensor, codes: Tensor, scale: Tensor, library: Kernels | None = None) -> Tensor:
    """y [M, N] in the dtype of x [M, K] from codes int8 [N, K] and scale float32 [N], as numerics.head.head.

    Raises ValueError for wrong dtypes, shapes, layouts or devices, before native code runs.
    """
    if x.dim() != 2 or x.dtype not in _DTYPES or x.device.type != "cpu":
        raise ValueError(f"x must be a float [M, K] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}")
    tokens, channels = x.shape
    if codes.dtype is not torch.int8 or codes.dim() != 2 or codes.shape[1] != channels or channels % CHANNEL_MULTIPLE:
        raise ValueError(f"codes must be int8 [N, {channels}], K a multiple of 16; got {codes.dtype} {codes.shape}")
    outputs = codes.shape[0]
    if scale.dtype is not torch.float32 or scale.shape != (outputs,):
        raise ValueError(f"scale must be float32 [{outputs}], got {scale.dtype} {list(scale.shape)}")
    if not all(part.is_contiguous() and part.is_cpu for part in (codes, scale)):
        raise ValueError("codes and scale must be contiguous and on the CPU")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty((tokens, outputs))
    if tokens and outputs:
        floats = torch.empty((tokens, channels), dtype=torch.float32)
        call = _CALL.pack(
            x.data_ptr(),
            x.stride(0),
            _DTYPES[x.dtype],
            tokens,
            channels,
            codes.data_ptr(),
            scale.data_ptr(),
            outputs,
            floats.data_ptr(),
            torch.get_num_threads(),
            y.data_ptr(),
        )
        (library or _loaded()).head(call)
    return y


def _loaded() -> Kernels:
    library = kernels()
    if library is None:
        raise RuntimeError("the CPU kernels do not run on this machine; leave lm_head in 16 bit")
    return library
