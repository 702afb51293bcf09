"""Kernel: int8 codes x int4 weights, in exact int32 per group, scaled and added up over groups in float32.

Weights are the left operand of the matrix units and tokens the right one: a register holds unpacked weights where the
units want their left operand, and a few tokens waste less of the narrow side. So the accumulator is [N, M].
"""

import triton
import triton.language as tl

# Both nibbles of four bytes in place, as 16 * q in int8: two instructions and one, for four weights each.
_LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }")
_HIGH = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")


@triton.jit
def unpack_low(packed, ASM: tl.constexpr):
    """16 * q of the low nibbles, int8; `packed` int8. ASM: NVIDIA instructions, else plain Triton (same values)."""
    if ASM:
        return tl.inline_asm_elementwise(_LOW, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    return packed << 4


@triton.jit
def unpack_high(packed, ASM: tl.constexpr):
    """16 * q of the high nibbles, int8; as `unpack_low`."""
    if ASM:
        return tl.inline_asm_elementwise(_HIGH, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    return packed & -16


@triton.jit(do_not_specialize=["M", "splits"])
def int4_gemm(
    codes_ptr,  # int8 [M, K]
    weight_ptr,  # int8 [N/TILE_N, K/P, TILE_N, P/2]
    scale_ptr,  # bfloat16 [K/G, N rounded up to TILE_N]
    rows_ptr,  # int32 [M]
    gain_ptr,  # float32 [R], divided by 16
    absorbed_bias_ptr,  # float32 [R, N]
    bias_ptr,  # [N] or unused
    out_ptr,  # y [M, N], or with PARTIAL the parts' sums, float32 [splits, M, N]
    M,
    N,
    K,
    splits,
    G: tl.constexpr,
    P: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTIAL: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the output, over one of `splits` parts of K; grid (tiles, splits).

    PARTIAL: write the sum as it is, for `reduce_splits`; else `splits` is 1. EVEN_K: P divides K.
    """
    HALF: tl.constexpr = P // 2
    token_tiles = tl.cdiv(M, BLOCK_M)
    channel_tiles = tl.cdiv(N, BLOCK_N)
    # GROUP_M token tiles share a tile of weights before the next one is read.
    pid = tl.program_id(0)
    group = pid // (GROUP_M * channel_tiles)
    group_tokens = min(token_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * channel_tiles)
    tile_m = group * GROUP_M + within % group_tokens
    tile_n = within // group_tokens

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, HALF)
    token_exists = m < M
    steps = tl.cdiv(K, P)
    per_split = tl.cdiv(steps, splits)
    first = tl.program_id(1) * per_split
    last = min(first + per_split, steps)

    padded_n = tl.cdiv(N, TILE_N) * TILE_N
    row_offset = (n // TILE_N).to(tl.int64) * (steps * TILE_N * HALF) + (n % TILE_N) * HALF
    weight_ptrs = weight_ptr + row_offset[:, None] + half[None, :]
    code_ptrs = codes_ptr + m[None, :].to(tl.int64) * K + half[:, None]
    scale_ptrs = scale_ptr + n

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        packed = tl.load(weight_ptrs + step * (TILE_N * HALF))
        low_codes = tl.load(code_ptrs + step * P, mask=token_exists[None, :], other=0)
        high_exists = token_exists[None, :]
        if not EVEN_K:
            high_exists = high_exists & (step * P + HALF + half < K)[:, None]
        high_codes = tl.load(code_ptrs + (step * P + HALF), mask=high_exists, other=0)
        low = unpack_low(packed, ASM)
        high = unpack_high(packed, ASM)
        if G < P:
            # The nibbles of a byte belong to two groups.
            low_scale = tl.load(scale_ptrs + (2 * step) * padded_n).to(tl.float32)
            high_scale = tl.load(scale_ptrs + (2 * step + 1) * padded_n).to(tl.float32)
            acc += tl.dot(low, low_codes, out_dtype=tl.int32).to(tl.float32) * low_scale[:, None]
            acc += tl.dot(high, high_codes, out_dtype=tl.int32).to(tl.float32) * high_scale[:, None]
        else:
            scale = tl.load(scale_ptrs + step * padded_n).to(tl.float32)
            sums = tl.dot(low, low_codes, out_dtype=tl.int32)
            sums = tl.dot(high, high_codes, acc=sums, out_dtype=tl.int32)
            acc += sums.to(tl.float32) * scale[:, None]

    n_exists = n < N
    exists = n_exists[:, None] & token_exists[None, :]
    out_ptrs = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    if PARTIAL:
        tl.store(out_ptrs + tl.program_id(1).to(tl.int64) * M * N, acc, mask=exists)
    else:
        rows = tl.load(rows_ptr + m, mask=token_exists, other=0)
        gain = tl.load(gain_ptr + rows, mask=token_exists, other=0.0)
        constant = tl.load(absorbed_bias_ptr + rows[None, :] * N + n[:, None], mask=exists, other=0.0)
        y = acc * gain[None, :] + constant
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n_exists, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=exists)
