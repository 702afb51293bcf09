"""Kernel: int8 codes x int4 weights, summed exactly in int32 per group, scaled and added up over groups in float32.

With two-level scales the sum over all of K is exact int32: kernels/gemm_two_level.py.

Weights are the left operand of the matrix units and tokens the right one, so the accumulator is [N, M]. Unpacked
weights already lie in the registers of a left operand. The right side is the narrow one, so few tokens waste less of
it.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.epilogue import PART_M, output_terms, write_output, write_parts
from morphoquant_vllm.gpu.kernels.gemm_two_level import two_level_sums
from morphoquant_vllm.gpu.kernels.pdl import let_next_start, wait_for_previous
from morphoquant_vllm.gpu.kernels.tile_order import tile_of

# Most tokens of a tile whose gains and absorbed biases are read before the loop. For few tokens they fit into
# registers. At decode the loop is short, and reading them after it would cost time.
EARLY_M = tl.constexpr(16)
# The low and the high nibbles of four bytes in place, as 16 * q in int8: two instructions and one for four weights.
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


@triton.jit
def group_sums(
    weight_ptrs,  # int8 [BLOCK_N, P/2], of the first step
    scale_ptrs,  # [BLOCK_N], of the first step
    code_ptrs,  # int8 [P/2, BLOCK_M], of the first step; JOINED: [P, BLOCK_M]
    token_exists,  # [BLOCK_M]
    first,
    last,
    padded_n,
    K,
    G: tl.constexpr,
    P: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The sums of the groups of steps `first` to `last`, scaled and added up, float32 [BLOCK_N, BLOCK_M].

    JOINED: both halves of a step are one operand; see `two_level_sums`. Only if P is G.
    """
    tl.static_assert(not JOINED or G == P, "halves of two groups cannot be joined")
    HALF: tl.constexpr = P // 2
    half = tl.arange(0, HALF)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        packed = tl.load(weight_ptrs + step * (TILE_N * HALF))
        # JOINED: the codes of both halves.
        low_codes = tl.load(code_ptrs + step * P, mask=token_exists[None, :], other=0)
        if not JOINED:
            high_exists = token_exists[None, :]
            if not EVEN_K:
                high_exists = high_exists & (step * P + HALF + half < K)[:, None]
            high_codes = tl.load(code_ptrs + (step * P + HALF), mask=high_exists, other=0)
        low = unpack_low(packed, ASM)
        high = unpack_high(packed, ASM)
        scale = tl.load(scale_ptrs + step * padded_n)
        if JOINED:
            weights = tl.join(low, high).permute(0, 2, 1).reshape(BLOCK_N, P)
            acc += tl.dot(weights, low_codes, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        elif G < P:
            # The nibbles of a byte belong to two groups, whose scales share a word.
            low_scale = (scale << 16).to(tl.float32, bitcast=True)
            high_scale = (scale & -65536).to(tl.float32, bitcast=True)
            acc += tl.dot(low, low_codes, out_dtype=tl.int32).to(tl.float32) * low_scale[:, None]
            acc += tl.dot(high, high_codes, out_dtype=tl.int32).to(tl.float32) * high_scale[:, None]
        else:
            sums = tl.dot(low, low_codes, out_dtype=tl.int32)
            sums = tl.dot(high, high_codes, acc=sums, out_dtype=tl.int32)
            acc += sums.to(tl.float32) * scale[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "splits"])
def int4_gemm(
    codes_ptr,  # int8 [M, K]
    rows_ptr,  # int32 [M]
    out_ptr,  # y [M, N], or with PARTIAL the partial sums, float32 (TWO_LEVEL: int32) [splits, M, N]
    M,
    splits,
    weight_ptr,  # int8 [N/TILE_N, K/P, TILE_N, P/2]
    scale_ptr,  # int32 or float32 [K/P, N rounded up to TILE_N]; TWO_LEVEL: int32 [K/2P, same]; see layout.py
    channel_scale_ptr,  # float32 [N], times 16; with TWO_LEVEL
    gain_ptr,  # float32 [R], divided by 16
    absorbed_bias_ptr,  # float32 [R, N]
    bias_ptr,  # [N] or unused
    N,
    K,
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
    JOINED: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the output, over one of `splits` ranges of K; grid (tiles, splits).

    PARTIAL: write partial sums for `reduce_splits`; else `splits` is 1. EVEN_K: P divides K; TWO_LEVEL: 2P does.
    JOINED: a turn of the loop multiplies once; see kernels/gemm_two_level.py.
    """
    let_next_start(PDL)
    HALF: tl.constexpr = P // 2
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_N, BLOCK_M, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, HALF)
    token_exists = m < M
    # Two-level scales take two steps at a time.
    WIDTH: tl.constexpr = 2 if TWO_LEVEL else 1
    turns = tl.cdiv(K, P * WIDTH)
    steps = turns * WIDTH
    per_split = tl.cdiv(turns, splits)
    first = tl.program_id(1) * per_split
    last = min(first + per_split, turns)

    padded_n = tl.cdiv(N, TILE_N) * TILE_N
    row_offset = (n // TILE_N).to(tl.int64) * (steps * TILE_N * HALF) + (n % TILE_N) * HALF
    weight_ptrs = weight_ptr + row_offset[:, None] + half[None, :]
    together = tl.arange(0, P * WIDTH if JOINED else HALF)
    code_ptrs = codes_ptr + m[None, :].to(tl.int64) * K + together[:, None]
    scale_ptrs = scale_ptr + n

    wait_for_previous(PDL)
    EARLY: tl.constexpr = not PARTIAL and BLOCK_M <= EARLY_M
    if EARLY:
        gain, constant = output_terms(m, n, rows_ptr, gain_ptr, absorbed_bias_ptr, M, N)
    if TWO_LEVEL:
        acc = two_level_sums(
            weight_ptrs,
            scale_ptrs,
            code_ptrs,
            token_exists,
            first,
            last,
            padded_n,
            K,
            P,
            TILE_N,
            BLOCK_N,
            BLOCK_M,
            EVEN_K,
            ASM,
            STAGES,
            UNROLL,
            JOINED,
        )
    else:
        acc = group_sums(
            weight_ptrs,
            scale_ptrs,
            code_ptrs,
            token_exists,
            first,
            last,
            padded_n,
            K,
            G,
            P,
            TILE_N,
            BLOCK_N,
            BLOCK_M,
            EVEN_K,
            ASM,
            STAGES,
            UNROLL,
            JOINED,
        )

    if PARTIAL:
        exists = (n < N)[:, None] & token_exists[None, :]
        out_ptrs = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out_ptrs + tl.program_id(1).to(tl.int64) * M * N, acc, mask=exists)
    elif EARLY:
        write_output(acc, gain, constant, m, n, channel_scale_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS, TWO_LEVEL)
    else:
        # Without a second accumulator in the loop the epilogue would need the most registers.
        TOGETHER: tl.constexpr = min(BLOCK_M, PART_M) if TWO_LEVEL else BLOCK_M
        write_parts(
            acc,
            tile_m * BLOCK_M,
            n,
            channel_scale_ptr,
            rows_ptr,
            gain_ptr,
            absorbed_bias_ptr,
            bias_ptr,
            out_ptr,
            M,
            N,
            BLOCK_N,
            BLOCK_M,
            TOGETHER,
            HAS_BIAS,
            TWO_LEVEL,
        )
