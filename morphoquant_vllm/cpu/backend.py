"""The CPU backend: checked calls of the compiled functions (cpu/kernels/) on records that cpu.layout.prepare made.

M tokens, K input channels, N output channels, R modality rows. At M = 1 the microseconds before native code are a
large share of a call, so most checks run once, when records are prepared. At each call `backends.check_inputs` has
checked x and modality; this module checks dtypes, shapes, layouts and devices of the rest. Native code checks that a
record's header fits the tensors before it reads the rest, and checks the modality of each token.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from morphoquant_vllm.cpu.build import Kernels, kernels
from morphoquant_vllm.cpu.layout import ACTIVATION_TENSORS, HEADER_BYTES, WEIGHT_TENSORS, prepare

__all__ = ["act_quant", "available", "instructions", "linear", "prepare"]

# As native code numbers them (cpu/kernels/call.h).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The fields of Request in cpu/kernels/record.h.
_REQUEST = struct.Struct("=18q")
# Return codes of the functions (cpu/kernels/entry.cpp).
_BAD_ROW, _NO_MEMORY = 1, 3


def available() -> bool:
    """Whether the kernels run here; builds them at the first call, and warns once if they do not."""
    return kernels() is not None


def instructions() -> str:
    """Instruction set of the kernels that run here; empty if none do."""
    library = kernels()
    return library.instructions if library is not None else ""


def act_quant(x: Tensor, modality: Tensor, activation: list[Tensor], library: Kernels | None = None) -> Tensor:
    """Codes int8 [M, K]; as ops.act_quant. Raises ValueError for records or inputs of another layout."""
    (block,) = _record(activation, ACTIVATION_TENSORS)
    x, modality = _inputs(x, modality)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    if x.shape[0]:
        request = _REQUEST.pack(
            *(x.data_ptr(), x.stride(0), DTYPES[x.dtype], *x.shape, modality.data_ptr()),
            *(block.data_ptr(), block.numel(), torch.get_num_threads(), codes.data_ptr()),
            *(0,) * 8,
        )
        status = (library or loaded()).act_quant(request)
        if status:
            raise error(status)
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
    (block,) = _record(activation, ACTIVATION_TENSORS)
    weight_block, absorbed_bias = _record(weight, WEIGHT_TENSORS)
    if absorbed_bias.dtype is not torch.float32 or absorbed_bias.dim() != 2 or not _plain(absorbed_bias):
        raise ValueError(f"absorbed_bias must be float32 [R, N], got {absorbed_bias.dtype} {list(absorbed_bias.shape)}")
    x, modality = _inputs(x, modality)
    tokens, channels = x.shape
    rows, outputs = absorbed_bias.shape
    bias_at = bias_dtype = 0
    if bias is not None:
        if bias.dtype not in DTYPES or bias.shape != (outputs,) or not bias.is_cpu:
            raise ValueError(f"bias must be a float [{outputs}] on the CPU, got {bias.dtype} {list(bias.shape)}")
        bias = bias.contiguous()
        bias_at, bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    y = x.new_empty((tokens, outputs))
    if tokens:
        # One call without unpacking: this line runs for every layer of every step.
        request = _REQUEST.pack(
            x.data_ptr(),
            x.stride(0),
            DTYPES[x.dtype],
            tokens,
            channels,
            modality.data_ptr(),
            block.data_ptr(),
            block.numel(),
            torch.get_num_threads(),
            0,
            weight_block.data_ptr(),
            weight_block.numel(),
            absorbed_bias.data_ptr(),
            rows,
            outputs,
            bias_at,
            bias_dtype,
            y.data_ptr(),
        )
        status = (library or loaded()).linear(request)
        if status:
            raise error(status)
    return y


def loaded() -> Kernels:
    """The kernels. Raises RuntimeError if none run here, or those of another version."""
    library = kernels()
    if library is None:
        raise RuntimeError("the CPU kernels do not run on this machine; use the backend 'reference'")
    if library.request_size != _REQUEST.size:
        raise RuntimeError("cpu/backend.py does not belong to these cpu/kernels; install the package again")
    return library


def error(status: int) -> Exception:
    """The exception for a return code of the native functions."""
    if status == _BAD_ROW:
        return IndexError("modality names a row that the activation record does not have")
    if status == _NO_MEMORY:
        return MemoryError("no memory for the codes of these tokens")
    return ValueError("the records must come from cpu.layout.prepare, for inputs and outputs of these sizes")


def _inputs(x: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """Check `x` and `modality`; x with adjacent channels, modality contiguous."""
    if x.dtype not in DTYPES or not x.is_cpu or not modality.is_cpu:
        raise ValueError(f"x must be float32, bfloat16 or float16 on the CPU, got {x.dtype} on {x.device}")
    return x if x.stride(1) == 1 else x.contiguous(), modality.contiguous()


def _record(record: list[Tensor], count: int) -> list[Tensor]:
    """A record of `count` tensors whose first is a block with room for its header."""
    if len(record) != count:
        raise ValueError(f"the record must have {count} tensors, as cpu.layout.prepare makes it, got {len(record)}")
    block = record[0]
    if block.dtype is not torch.uint8 or block.dim() != 1 or not _plain(block) or block.numel() < HEADER_BYTES:
        raise ValueError(f"the record must begin with a block of bytes on the CPU, got {block.dtype} {block.shape}")
    return record


def _plain(part: Tensor) -> bool:
    return part.is_cpu and part.is_contiguous()
