"""Kernel: activation -> int8 codes in permuted channel order, and the row that serves each token."""

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 rounds a small float32 to an integer, half to even, on every target and in the
# interpreter; the conversion instructions that Triton offers do not run there.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 rounded to `dtype`, half to even, as float32; bfloat16 by its bits, which the interpreter would cut."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # The carry could make a number of a NaN.
        return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype).to(tl.float32)


@triton.jit
def load_activation(x_row, channel, exists, K, SILU_MUL: tl.constexpr):
    """Channels of one token as float32; 0 where `exists` is false. SILU_MUL: silu(gate) * up of a row [gate, up]."""
    x = tl.load(x_row + channel, mask=exists, other=0.0)
    if SILU_MUL:
        up = tl.load(x_row + K + channel, mask=exists, other=0.0)
        gate = x.to(tl.float32)
        # Rounded to the activation's type after either operation, as torch does.
        silu = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), up.dtype)
        x = rounded(silu * up.to(tl.float32), up.dtype)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["x_stride"], do_not_specialize_on_alignment=["x_ptr", "modality_ptr"])
def quantize_activation(
    x_ptr,  # [M, K], rows x_stride elements apart; with SILU_MUL [M, 2K]
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
    SILU_MUL: tl.constexpr,
):
    """BLOCK_K codes of one token; grid (M, tiles of K). Each program decides by itself whether the token is massive.

    The order of float32 operations is that of numerics.activation: subtract, multiply, round half to even, clamp.
    Clamping first gives the same codes, since the limits are integers, and keeps the rounding constant valid.
    SILU_MUL: what is quantized is silu(gate) * up of x = [gate, up].
    """
    m = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + m * x_stride

    interval = tl.arange(0, B)[:, None] * J + tl.arange(0, J)[None, :]
    channel = tl.load(massive_channel_ptr + interval)
    values = load_activation(x_row, channel, channel >= 0, K, SILU_MUL)
    # A NaN fails both comparisons.
    inside = (values >= tl.load(massive_low_ptr + interval)) & (values <= tl.load(massive_high_ptr + interval))
    massive = tl.max(tl.min(inside.to(tl.int32), axis=1), axis=0)
    row = tl.where(massive > 0, R - 1, tl.load(modality_ptr + m))

    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = k < K
    table = row * K + k
    x = load_activation(x_row, tl.load(order_ptr + k, mask=exists, other=0), exists, K, SILU_MUL)
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
