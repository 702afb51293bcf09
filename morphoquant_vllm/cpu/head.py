"""lm_head on a CPU, 8-bit or bfloat16: checked calls of the compiled functions (cpu/kernels/head.h, head_bfloat16.h).

M tokens, K channels, N outputs. Each call checks everything that native code relies on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from morphoquant_vllm.cpu.backend import DTYPES, loaded
from morphoquant_vllm.cpu.build import Kernels, cpu_flags, kernels

# K must be a multiple of the longest vector of any instruction set: of float32, and of bfloat16.
CHANNEL_MULTIPLE, BFLOAT16_MULTIPLE = 16, 32
# The fields of HeadCall in cpu/kernels/head.h, and of HeadBFloat16Call in head_bfloat16.h.
_CALL, _BFLOAT16_CALL = struct.Struct("=11q"), struct.Struct("=9q")


def head(x: Tensor, codes: Tensor, scale: Tensor, library: Kernels | None = None) -> Tensor:
    """y [M, N] in the dtype of x [M, K] from codes int8 [N, K] and scale float32 [N], as numerics.head.head.

    Raises ValueError for wrong dtypes, shapes, layouts or devices, before native code runs.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
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
    library = library or loaded()
    if library.head_bfloat16 is not None and x.dtype is torch.bfloat16 and channels % BFLOAT16_MULTIPLE == 0:
        # For every M: a token's logits must be the same in every batch.
        _run_bfloat16(library.head_bfloat16, x, codes, scale, y)
    elif tokens and outputs:
        floats = torch.empty((tokens, channels), dtype=torch.float32)
        call = _CALL.pack(
            x.data_ptr(),
            x.stride(0),
            DTYPES[x.dtype],
            tokens,
            channels,
            codes.data_ptr(),
            scale.data_ptr(),
            outputs,
            floats.data_ptr(),
            torch.get_num_threads(),
            y.data_ptr(),
        )
        library.head(call)
    return y


def _run_bfloat16(run: Callable[[bytes], int], x: Tensor, weight: Tensor, scale: Tensor | None, y: Tensor) -> None:
    if y.numel():
        run(
            _BFLOAT16_CALL.pack(
                x.data_ptr(),
                x.stride(0),
                x.shape[0],
                x.shape[1],
                weight.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                weight.shape[0],
                torch.get_num_threads(),
                y.data_ptr(),
            )
        )


def eight_bit_refusal(weight: Tensor) -> str | None:
    """The reason why `head` cannot use codes of a weight [N, K]; None if it can."""
    if weight.shape[1] % CHANNEL_MULTIPLE:
        return f"K = {weight.shape[1]} is not a multiple of {CHANNEL_MULTIPLE}"
    return None


def serves_bfloat16(weight: Tensor) -> bool:
    """Whether `head_bfloat16` takes `weight` on this machine, and is the fastest choice.

    A processor with AMX multiplies bfloat16 of many tokens several times as fast: there vLLM's head stays.
    """
    library = kernels() if weight.device.type == "cpu" else None
    fits = weight.dtype is torch.bfloat16 and weight.dim() == 2 and weight.shape[1] % BFLOAT16_MULTIPLE == 0
    return fits and library is not None and library.head_bfloat16 is not None and "amx_bf16" not in cpu_flags()


def head_bfloat16(x: Tensor, weight: Tensor, library: Kernels | None = None) -> Tensor:
    """y [M, N] = x [M, K] times weight [N, K], all bfloat16: sums in float32, cast once.

    Raises ValueError for wrong dtypes, shapes, layouts or devices, before native code runs, and RuntimeError on a
    processor without AVX512-BF16.
    """
    for name, part in (("x", x), ("weight", weight)):
        if part.dim() != 2 or part.dtype is not torch.bfloat16 or part.device.type != "cpu":
            raise ValueError(f"{name} must be bfloat16 and 2-D on the CPU, got {part.dtype} {list(part.shape)}")
    tokens, channels = x.shape
    if weight.shape[1] != channels or channels % BFLOAT16_MULTIPLE or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [N, {channels}], K a multiple of 32; got {list(weight.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    run = (library or loaded()).head_bfloat16
    if run is None:
        raise RuntimeError("the bfloat16 head needs AVX512-BF16; leave lm_head to vLLM")
    y = x.new_empty((tokens, weight.shape[0]))
    _run_bfloat16(run, x, weight, None, y)
    return y
