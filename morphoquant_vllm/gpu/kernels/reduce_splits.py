"""Kernel: adds the partial sums of a split K in order, and finishes the output."""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.pdl import let_next_start, wait_for_previous


@triton.jit(do_not_specialize=["M", "splits"])
def reduce_splits(
    part_ptr,  # float32 (TWO_LEVEL: int32) [splits, M, N]
    rows_ptr,  # int32 [M]
    out_ptr,  # [M, N]
    M,
    splits,
    channel_scale_ptr,  # float32 [N], times 16; with TWO_LEVEL
    gain_ptr,  # float32 [R], divided by 16
    absorbed_bias_ptr,  # float32 [R, N]
    bias_ptr,  # [N] or unused
    N,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of one token; grid (M, tiles of N). No atomics: the same bits in every run."""
    let_next_start(PDL)
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < N
    wait_for_previous(PDL)
    row = tl.load(rows_ptr + m)
    gain = tl.load(gain_ptr + row)
    constant = tl.load(absorbed_bias_ptr + row * N + n, mask=exists, other=0.0)
    acc = tl.zeros((BLOCK_N,), dtype=part_ptr.dtype.element_ty)
    for part in range(splits):
        acc += tl.load(part_ptr + (part * M + m) * N + n, mask=exists, other=0)
    if TWO_LEVEL:
        acc = acc.to(tl.float32) * tl.load(channel_scale_ptr + n, mask=exists, other=0.0)
    y = acc * gain + constant
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=exists)
