"""Kernels of routed experts: the product of pairs grouped by expert, their quantizer, and the sum over a token's pairs.

A pair is a token and an expert that it chose; pair p of T slots belongs to token p // T. The device sorts pairs into
blocks of one expert each. The number of blocks is the largest that there can be, so that it follows from shapes; those
that stay empty end at once.

    codes [M, K] --gathered by token--> gate_up [pairs, 2I] --> codes [pairs, I] --> down [pairs, K] --> y [M, K]
                   block -> expert, place -> pair              expert of each pair                  slots in order
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation
from morphoquant_vllm.gpu.kernels.epilogue import output_terms, write_output
from morphoquant_vllm.gpu.kernels.gemm import EARLY_M, group_sums
from morphoquant_vllm.gpu.kernels.gemm_two_level import two_level_sums


@triton.jit(do_not_specialize=["pairs", "slots", "R", "E"])
def experts_gemm(
    codes_ptr,  # int8 [pairs / slots, K]
    rows_ptr,  # int32 [pairs / slots]
    out_ptr,  # [pairs, N]; pairs of no expert are not written
    expert_ptr,  # int32 [blocks]: the expert of a block; E if it is empty
    pair_ptr,  # int32 [blocks * BLOCK_M]: the pair in a place; `pairs` if there is none
    pairs,
    slots,  # pairs that share a line of codes
    weight_ptr,  # int8 [E, N/TILE_N, K/P, TILE_N, P/2]
    scale_ptr,  # int32 or float32 [E, K/P, N rounded up to TILE_N]; TWO_LEVEL: int32 [E, K/2P, same]; see layout.py
    channel_scale_ptr,  # float32 [E, N], times 16; with TWO_LEVEL
    gain_ptr,  # float32 [E, R], divided by 16
    absorbed_bias_ptr,  # float32 [E, R, N]
    N,
    K,
    R,
    E,
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
    TWO_LEVEL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the output; grid (blocks * tiles of N). The loops are those of `int4_gemm`."""
    HALF: tl.constexpr = P // 2
    WIDTH: tl.constexpr = 2 if TWO_LEVEL else 1
    channel_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // channel_tiles
    expert = tl.load(expert_ptr + block).to(tl.int64)
    if expert < E:
        pair = tl.load(pair_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        token = pair // slots
        token_exists = pair < pairs
        n = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        half = tl.arange(0, HALF)
        turns = tl.cdiv(K, P * WIDTH)
        padded_n = tl.cdiv(N, TILE_N) * TILE_N
        tile_bytes = turns * WIDTH * (TILE_N * HALF)
        row_offset = (n // TILE_N).to(tl.int64) * tile_bytes + (n % TILE_N) * HALF
        weight_ptrs = weight_ptr + expert * (padded_n // TILE_N) * tile_bytes + row_offset[:, None] + half[None, :]
        together = tl.arange(0, P * WIDTH if JOINED else HALF)
        code_ptrs = codes_ptr + token[None, :].to(tl.int64) * K + together[:, None]
        scale_ptrs = scale_ptr + expert * turns * padded_n + n
        gain_of_expert = gain_ptr + expert * R
        absorbed_of_expert = absorbed_bias_ptr + expert * R * N
        EARLY: tl.constexpr = BLOCK_M <= EARLY_M
        if EARLY:
            gain, constant = output_terms(token, n, rows_ptr, gain_of_expert, absorbed_of_expert, pairs // slots, N)
        if TWO_LEVEL:
            acc = two_level_sums(
                weight_ptrs,
                scale_ptrs,
                code_ptrs,
                token_exists,
                0,
                turns,
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
                0,
                turns,
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
        if not EARLY:
            gain, constant = output_terms(token, n, rows_ptr, gain_of_expert, absorbed_of_expert, pairs // slots, N)
        scale_of_expert = channel_scale_ptr + expert * N
        # Without a bias: that pointer is not read.
        write_output(
            acc, gain, constant, pair, n, scale_of_expert, scale_of_expert, out_ptr, pairs, N, False, TWO_LEVEL
        )


@triton.jit(do_not_specialize=["x_stride", "E"], do_not_specialize_on_alignment=["x_ptr", "modality_ptr", "ids_ptr"])
def quantize_pairs(
    x_ptr,  # [pairs, 2K], gate and up of each pair
    modality_ptr,  # int32 [pairs]
    ids_ptr,  # int32 [pairs]: experts; pairs of others than [0, E) are not written
    codes_ptr,  # int8 [pairs, K], written
    rows_ptr,  # int32 [pairs], written
    x_stride,
    inverse_ptr,  # float32 [E, R, K]
    centre_ptr,  # float32 [E, R, K]
    limit_ptr,  # int8 [E, R, K]
    order_ptr,  # int32 [E, K]
    massive_channel_ptr,  # int32 [E, B, J]
    massive_low_ptr,  # float32 [E, B, J]
    massive_high_ptr,  # float32 [E, B, J]
    K,
    R,
    E,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_ORDER: tl.constexpr,
):
    """BLOCK_K codes of silu(gate) * up of one pair by its expert's record; grid (pairs * tiles of K)."""
    pair = tl.program_id(0) // tl.cdiv(K, BLOCK_K)
    expert = tl.load(ids_ptr + pair)
    if (expert >= 0) & (expert < E):
        table, interval = expert * R * K, expert * (B * J)
        quantize_activation(
            x_ptr,
            modality_ptr,
            codes_ptr,
            rows_ptr,
            x_stride,
            inverse_ptr + table,
            centre_ptr + table,
            limit_ptr + table,
            order_ptr + (0 if IN_ORDER else expert * K),
            massive_channel_ptr + interval,
            massive_low_ptr + interval,
            massive_high_ptr + interval,
            K,
            R,
            B,
            J,
            BLOCK_K,
            True,
            IN_ORDER,
            False,
        )


@triton.jit(do_not_specialize=["slots", "E"], do_not_specialize_on_alignment=["weights_ptr", "ids_ptr"])
def add_pairs(
    products_ptr,  # float32 [M * slots, N]
    weights_ptr,  # float32 [M, slots]
    ids_ptr,  # int32 [M, slots]: experts; those outside [0, E) add nothing
    y_ptr,  # [M, N], written
    slots,
    N,
    E,
    BLOCK_N: tl.constexpr,
):
    """The weighted sum of a token's pairs in the order of its slots, in float32; grid (M, tiles of N)."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in range(slots):
        pair = token * slots + slot
        expert = tl.load(ids_ptr + pair)
        local = (expert >= 0) & (expert < E)
        weight = tl.where(local, tl.load(weights_ptr + pair), 0.0)
        total += weight * tl.load(products_ptr + pair * N + n, mask=n < tl.where(local, N, 0), other=0.0)
    tl.store(y_ptr + token * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)
