"""Kernel: RMSNorm, with the sum of input and residual before it, and the quantizer of the layer after it.

The norm is that of numerics/norm.py, except for the order in which squares are added. So a 16-bit value may differ if
it lies near a rounding tie. From those values on, codes and rows equal those of act_quant.py to the bit.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.act_quant import codes_of, rounded
from morphoquant_vllm.gpu.kernels.pdl import let_next_start


@triton.jit
def load_sum(x_row, residual_row, channel, exists, ADD: tl.constexpr):
    """Channels of x as float32, or of x + residual with ADD; 0 if `exists` is false."""
    total = tl.load(x_row + channel, mask=exists, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_row + channel, mask=exists, other=0.0).to(tl.float32)
    return total


@triton.jit
def normed_values(total, root, weight):
    """Values of the norm as float32, each a value of the weight's type: divided, rounded, weighted and rounded."""
    divided = rounded(total * root, weight.dtype)
    return rounded(divided * weight.to(tl.float32), weight.dtype)


@triton.jit
def is_massive_normed(
    x_row,
    residual_row,
    norm_weight_ptr,
    root,
    massive_channel_ptr,
    massive_low_ptr,
    massive_high_ptr,
    B: tl.constexpr,
    J: tl.constexpr,
    ADD: tl.constexpr,
):
    """Whether the norm of a token lies in all J intervals of one of B sets, as 0 or 1; see act_quant.is_massive."""
    interval = tl.arange(0, B)[:, None] * J + tl.arange(0, J)[None, :]
    channel = tl.load(massive_channel_ptr + interval)
    low = tl.load(massive_low_ptr + interval)
    high = tl.load(massive_high_ptr + interval)
    weight = tl.load(norm_weight_ptr + channel, mask=channel >= 0, other=0.0)
    # Operations and numbers are the same as for the whole token, and so are the bits.
    values = normed_values(load_sum(x_row, residual_row, channel, channel >= 0, ADD), root, weight)
    inside = (values >= low) & (values <= high)
    return tl.max(tl.min(inside.to(tl.int32), axis=1), axis=0)


@triton.jit
def load_tables(centre_ptr, inverse_ptr, limit_ptr, table, exists):
    """Centre, inverse and limit at the offsets `table` of the quantizer's tables."""
    centre = tl.load(centre_ptr + table, mask=exists, other=0.0)
    inverse = tl.load(inverse_ptr + table, mask=exists, other=0.0)
    return centre, inverse, tl.load(limit_ptr + table, mask=exists, other=0)


@triton.jit(do_not_specialize=["M", "tokens"], do_not_specialize_on_alignment=["modality_ptr"])
def quantize_normed(
    x_ptr,  # [M, K], rows x_stride elements apart
    residual_ptr,  # the same, residual_stride apart; with ADD
    norm_weight_ptr,  # [K], dtype of x
    modality_ptr,  # int32 [M]
    codes_ptr,  # int8 [M, K], written
    rows_ptr,  # int32 [M], written
    new_residual_ptr,  # [M, K], written with ADD
    epsilon,
    x_stride,
    residual_stride,
    M,
    tokens,
    normed_ptr,  # [M, K], written with WRITE_NORMED
    inverse_ptr,  # float32 [R, K]
    centre_ptr,  # float32 [R, K]
    limit_ptr,  # int8 [R, K]
    order_ptr,  # int32 [K]; not read IN_ORDER
    massive_channel_ptr,  # int32 [B, J]
    massive_low_ptr,  # float32 [B, J]
    massive_high_ptr,  # float32 [B, J]
    K,
    R,
    B: tl.constexpr,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    WRITE_NORMED: tl.constexpr,
    IN_ORDER: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """All codes of `tokens` tokens, held in registers; WIDTH is a power of two >= K; grid (M / tokens).

    Without IN_ORDER, values are gathered in shared memory, BLOCK_K at a time. Tokens of x and residual begin on 16
    bytes: they are read 16 bytes at a time. EARLY, for few tokens: the tables of both rows that a token may have are
    read before its norm, because waiting dominates then.
    """
    let_next_start(PDL)
    channel = tl.arange(0, WIDTH)
    exists = channel < K
    weight = tl.load(norm_weight_ptr + channel, mask=exists, other=0.0)
    first = tl.program_id(0).to(tl.int64) * tokens
    for token in tl.range(0, min(tokens, M - tl.program_id(0) * tokens), num_stages=1):
        m = first + token
        x_row, residual_row = x_ptr + m * x_stride, residual_ptr + m * residual_stride
        modality = tl.load(modality_ptr + m)
        if EARLY:
            # The tables of both rows that the token may have do not depend on the norm, so they are read before it.
            order = channel if IN_ORDER else tl.load(order_ptr + channel, mask=exists, other=0)
            own = load_tables(centre_ptr, inverse_ptr, limit_ptr, modality * K + channel, exists)
            last = load_tables(centre_ptr, inverse_ptr, limit_ptr, (R - 1) * K + channel, exists)
        total = load_sum(x_row, residual_row, channel, exists, ADD)
        if ADD:
            tl.store(new_residual_ptr + m * K + channel, rounded(total, weight.dtype).to(weight.dtype), mask=exists)
        mean = tl.div_rn(tl.sum(total * total, axis=0), K.to(tl.float32))
        root = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
        normed = normed_values(total, root, weight)
        if WRITE_NORMED:
            tl.store(normed_ptr + m * K + channel, normed.to(weight.dtype), mask=exists)
        massive = is_massive_normed(
            *(x_row, residual_row, norm_weight_ptr, root),
            *(massive_channel_ptr, massive_low_ptr, massive_high_ptr, B, J, ADD),
        )
        row = tl.where(massive > 0, R - 1, modality)
        tl.store(rows_ptr + m, row)
        values = normed.to(weight.dtype)
        if EARLY:
            gathered = normed if IN_ORDER else tl.gather(values, order, 0).to(tl.float32)
            codes = codes_of(
                gathered,
                tl.where(massive > 0, last[0], own[0]),
                tl.where(massive > 0, last[1], own[1]),
                tl.where(massive > 0, last[2], own[2]),
            )
            tl.store(codes_ptr + m * K + channel, codes.to(tl.int8), mask=exists)
        elif IN_ORDER:
            centre, inverse, limit = load_tables(centre_ptr, inverse_ptr, limit_ptr, row * K + channel, exists)
            codes = codes_of(normed, centre, inverse, limit)
            tl.store(codes_ptr + m * K + channel, codes.to(tl.int8), mask=exists)
        else:
            for start in tl.range(0, K, BLOCK_K, num_stages=1):
                k = start + tl.arange(0, BLOCK_K)
                within = k < K
                gathered = tl.gather(values, tl.load(order_ptr + k, mask=within, other=0), 0).to(tl.float32)
                centre, inverse, limit = load_tables(centre_ptr, inverse_ptr, limit_ptr, row * K + k, within)
                tl.store(codes_ptr + m * K + k, codes_of(gathered, centre, inverse, limit).to(tl.int8), mask=within)
