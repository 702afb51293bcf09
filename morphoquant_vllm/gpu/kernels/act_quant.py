"""Kernels: activation -> int8 codes in channel order, and the row of each token.

Three kernels give the same result. In `quantize_activation` a program has some channels of one token, so few tokens
fill the device. It gathers them from memory. In `quantize_tokens` a program has whole tokens. It reads them in order
and gathers in shared memory, because a gathered load from memory takes a sector of 32 bytes for two bytes.
`quantize_in_order` serves many tokens whose channels come in channel order (mlp_channel_order.py). There a program
quantizes the same channels of several tokens, whose tables stay in the cache of its multiprocessor.

    x [M, K] --by order--> x - centre --times inverse--> clamp, round --> codes [M, K]
                 |                 of the token's row: its modality's, or the last one's
                 +--> intervals of a few channels: is it massive? --> rows [M]

The order of float32 operations is that of numerics.activation: subtract, multiply, round half to even, clamp. The
kernels clamp before they round. That gives the same codes, since the limits are integers, and keeps the rounding
constant valid. SILU_MUL: x is [gate, up], and silu(gate) * up is quantized.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.pdl import let_next_start

# Adding and subtracting 1.5 * 2^23 rounds a small float32 to an integer, half to even, on every target. It also runs in
# the interpreter, unlike Triton's conversion instructions.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 rounded to `dtype`, half to even, as float32; bfloat16 by its bits: the interpreter would truncate."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # The carry could turn a NaN into a number.
        return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype).to(tl.float32)


@triton.jit
def load_activation(x_row, channel, exists, K, SILU_MUL: tl.constexpr):
    """Channels of one token as float32; 0 if `exists` is false. SILU_MUL: silu(gate) * up of [gate, up]."""
    x = tl.load(x_row + channel, mask=exists, other=0.0)
    if SILU_MUL:
        up = tl.load(x_row + K + channel, mask=exists, other=0.0)
        gate = x.to(tl.float32)
        # Each operation rounds to the activation's dtype, as in torch.
        silu = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), up.dtype)
        x = rounded(silu * up.to(tl.float32), up.dtype)
    return x.to(tl.float32)


@triton.jit
def is_massive(
    x_row,
    massive_channel_ptr,
    massive_low_ptr,
    massive_high_ptr,
    K,
    B: tl.constexpr,
    J: tl.constexpr,
    SILU_MUL: tl.constexpr,
):
    """Whether a token lies in all J intervals of one of B sets, as 0 or 1."""
    interval = tl.arange(0, B)[:, None] * J + tl.arange(0, J)[None, :]
    channel = tl.load(massive_channel_ptr + interval)
    low = tl.load(massive_low_ptr + interval)
    high = tl.load(massive_high_ptr + interval)
    values = load_activation(x_row, channel, channel >= 0, K, SILU_MUL)
    # A NaN fails both comparisons.
    inside = (values >= low) & (values <= high)
    return tl.max(tl.min(inside.to(tl.int32), axis=1), axis=0)


@triton.jit
def codes_of(x, centre, inverse, limit):
    """Codes of float32 values, as float32: integers between -1 - limit and limit; 0 for NaN."""
    high = limit.to(tl.float32)
    scaled = (x - centre) * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    clamped = tl.minimum(tl.maximum(scaled, -1.0 - high), high)
    return (clamped + _ROUND) - _ROUND


@triton.jit(do_not_specialize=["x_stride"], do_not_specialize_on_alignment=["x_ptr", "modality_ptr"])
def quantize_activation(
    x_ptr,  # [M, K], rows x_stride elements apart; with SILU_MUL [M, 2K]
    modality_ptr,  # int32 [M]
    codes_ptr,  # int8 [M, K], written
    rows_ptr,  # int32 [M], written
    x_stride,
    inverse_ptr,  # float32 [R, K]
    centre_ptr,  # float32 [R, K]
    limit_ptr,  # int8 [R, K]: the highest code; the lowest is -1 - limit
    order_ptr,  # int32 [K]
    massive_channel_ptr,  # int32 [B, J]
    massive_low_ptr,  # float32 [B, J]
    massive_high_ptr,  # float32 [B, J]
    K,
    R,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SILU_MUL: tl.constexpr,
    IN_ORDER: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_K codes of one token; grid (M * tiles of K). Each program decides whether its token is massive.

    IN_ORDER: channels come in channel order; `order_ptr` is not read.
    """
    let_next_start(PDL)
    # The programs of a token follow each other: they gather from the same values of x, which stay in a cache.
    tiles = tl.cdiv(K, BLOCK_K)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = k < K
    x_row = x_ptr + m * x_stride
    # The tables of both rows that the token may have are read, so the reads do not wait for that decision.
    modality = tl.load(modality_ptr + m)
    channel = k if IN_ORDER else tl.load(order_ptr + k, mask=exists, other=0)
    table, last = modality * K + k, (R - 1) * K + k
    centre = tl.load(centre_ptr + table, mask=exists, other=0.0)
    inverse = tl.load(inverse_ptr + table, mask=exists, other=0.0)
    limit = tl.load(limit_ptr + table, mask=exists, other=0)
    massive_centre = tl.load(centre_ptr + last, mask=exists, other=0.0)
    massive_inverse = tl.load(inverse_ptr + last, mask=exists, other=0.0)
    massive_limit = tl.load(limit_ptr + last, mask=exists, other=0)
    x = load_activation(x_row, channel, exists, K, SILU_MUL)
    massive = is_massive(x_row, massive_channel_ptr, massive_low_ptr, massive_high_ptr, K, B, J, SILU_MUL) > 0
    codes = codes_of(
        x,
        tl.where(massive, massive_centre, centre),
        tl.where(massive, massive_inverse, inverse),
        tl.where(massive, massive_limit, limit),
    )
    tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=exists)
    if tl.program_id(0) % tiles == 0:
        tl.store(rows_ptr + m, tl.where(massive, R - 1, modality))


@triton.jit(do_not_specialize=["x_stride", "M", "tokens"], do_not_specialize_on_alignment=["x_ptr", "modality_ptr"])
def quantize_tokens(
    x_ptr,
    modality_ptr,
    codes_ptr,
    rows_ptr,
    x_stride,
    M,
    tokens,
    inverse_ptr,
    centre_ptr,
    limit_ptr,
    order_ptr,
    massive_channel_ptr,
    massive_low_ptr,
    massive_high_ptr,
    K,
    R,
    B: tl.constexpr,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):
    """All codes of `tokens` tokens, BLOCK_K at a time; arguments as `quantize_activation`'s, WIDTH a power of two >= K.

    Grid (M / tokens). Tables of narrow layers stay in a cache from one token to the next.
    """
    let_next_start(PDL)
    channel = tl.arange(0, WIDTH)
    first = tl.program_id(0).to(tl.int64) * tokens
    for token in tl.range(0, min(tokens, M - tl.program_id(0) * tokens), num_stages=1):
        m = first + token
        x_row = x_ptr + m * x_stride
        # The values are exact in the dtype of x, which takes half the shared memory of float32.
        x = load_activation(x_row, channel, channel < K, K, SILU_MUL).to(x_ptr.dtype.element_ty)
        massive = is_massive(x_row, massive_channel_ptr, massive_low_ptr, massive_high_ptr, K, B, J, SILU_MUL)
        row = tl.where(massive > 0, R - 1, tl.load(modality_ptr + m))
        tl.store(rows_ptr + m, row)
        for start in tl.range(0, K, BLOCK_K, num_stages=1):
            k = start + tl.arange(0, BLOCK_K)
            exists = k < K
            table = row * K + k
            gathered = tl.gather(x, tl.load(order_ptr + k, mask=exists, other=0), 0).to(tl.float32)
            codes = codes_of(
                gathered,
                tl.load(centre_ptr + table, mask=exists, other=0.0),
                tl.load(inverse_ptr + table, mask=exists, other=0.0),
                tl.load(limit_ptr + table, mask=exists, other=0),
            )
            tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=exists)


@triton.jit(do_not_specialize=["M", "tokens"], do_not_specialize_on_alignment=["modality_ptr"])
def quantize_in_order(
    x_ptr,
    modality_ptr,
    codes_ptr,
    rows_ptr,
    x_stride,
    M,
    tokens,
    inverse_ptr,
    centre_ptr,
    limit_ptr,
    massive_channel_ptr,
    massive_low_ptr,
    massive_high_ptr,
    K,
    R,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_K codes of each of `tokens` tokens; arguments as `quantize_activation`'s; grid (M / tokens * tiles of K).

    Tokens begin on 16 bytes, unlike those of the other quantizers: they are read 16 bytes at a time.
    """
    let_next_start(PDL)
    tiles = tl.cdiv(K, BLOCK_K)
    first = (tl.program_id(0) // tiles) * tokens
    k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = k < K
    for token in tl.range(0, min(tokens, M - first), num_stages=1):
        m = (first + token).to(tl.int64)
        x_row = x_ptr + m * x_stride
        x = load_activation(x_row, k, exists, K, SILU_MUL)
        massive = is_massive(x_row, massive_channel_ptr, massive_low_ptr, massive_high_ptr, K, B, J, SILU_MUL)
        row = tl.where(massive > 0, R - 1, tl.load(modality_ptr + m))
        if tl.program_id(0) % tiles == 0:
            tl.store(rows_ptr + m, row)
        table = row * K + k
        codes = codes_of(
            x,
            tl.load(centre_ptr + table, mask=exists, other=0.0),
            tl.load(inverse_ptr + table, mask=exists, other=0.0),
            tl.load(limit_ptr + table, mask=exists, other=0),
        )
        tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=exists)
