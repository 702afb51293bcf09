"""Kernel: activation -> int8 codes in permuted channel order, and the row that serves each token."""

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 rounds a small float32 to an integer, half to even, on every target and in the
# interpreter; the conversion instructions that Triton offers do not run there.
_ROUND = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["x_stride"], do_not_specialize_on_alignment=["x_ptr", "modality_ptr"])
def quantize_activation(
    x_ptr,  # [M, K], rows x_stride elements apart
    modality_ptr,  # int32 [M]
    inverse_ptr,  # float32 [R, K]
    centre_ptr,  # float32 [R, K]
    limit_ptr,  # int8 [R, K]: the highest code; the lowest is -1 - limit
    order_ptr,  # int32 [K]
    massive_channel_ptr,  # int32 [B, J]
    massive_low_ptr,  # float32 [B, J]
    massive_high_ptr,  # float32 [B, J]
    codes_ptr,  # int8 [M, K], written
    rows_ptr,  # int32 [M], written
    x_stride,
    K,
    R,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K codes of one token; grid (M, tiles of K). Each program decides by itself whether the token is massive.

    The order of float32 operations is that of numerics.activation: subtract, multiply, round half to even, clamp.
    Clamping first gives the same codes, since the limits are integers, and keeps the rounding constant valid.
    """
    m = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + m * x_stride

    interval = tl.arange(0, B)[:, None] * J + tl.arange(0, J)[None, :]
    values = tl.load(x_row + tl.load(massive_channel_ptr + interval)).to(tl.float32)
    # A NaN fails both comparisons.
    inside = (values >= tl.load(massive_low_ptr + interval)) & (values <= tl.load(massive_high_ptr + interval))
    massive = tl.max(tl.min(inside.to(tl.int32), axis=1), axis=0)
    row = tl.where(massive > 0, R - 1, tl.load(modality_ptr + m))

    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = k < K
    table = row * K + k
    x = tl.load(x_row + tl.load(order_ptr + k, mask=exists, other=0), mask=exists, other=0.0).to(tl.float32)
    centre = tl.load(centre_ptr + table, mask=exists, other=0.0)
    inverse = tl.load(inverse_ptr + table, mask=exists, other=0.0)
    high = tl.load(limit_ptr + table, mask=exists, other=0).to(tl.float32)
    scaled = (x - centre) * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    clamped = tl.minimum(tl.maximum(scaled, -1.0 - high), high)
    codes = (clamped + _ROUND) - _ROUND
    tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=exists)
    if tl.program_id(1) == 0:
        tl.store(rows_ptr + m, row)
