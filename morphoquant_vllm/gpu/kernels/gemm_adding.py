"""Kernel: the matrix product over a split K that also adds its parts, for one launch less. No shipped tile has it.

    programs of one tile of the output, one for each part of K
      each:  writes its part's sums, then draws a number from the tile's counter
      the last: adds all parts in their order, whichever order they ended in, writes the outputs, sets the counter to 0

So the bits are those of `reduce_splits`. An atomic addition draws the number. It releases the program's writes and
acquires those of the others. Parts are read past the multiprocessor's cache.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.epilogue import output_terms, write_output
from morphoquant_vllm.gpu.kernels.gemm import int4_gemm
from morphoquant_vllm.gpu.kernels.tile_order import tile_of

# Tokens whose outputs are added up and finished at a time. They decide the registers of the ending.
ADDED_M = tl.constexpr(16)


@triton.jit(do_not_specialize=["M", "splits"])
def int4_gemm_adding(
    codes_ptr,
    rows_ptr,
    part_ptr,  # float32 (TWO_LEVEL: int32) [splits, M, N], written and read
    out_ptr,  # y [M, N], written
    counter_ptr,  # int32 [tiles or more], zeros before and after
    M,
    splits,
    weight_ptr,
    scale_ptr,
    channel_scale_ptr,
    gain_ptr,
    absorbed_bias_ptr,
    bias_ptr,
    N,
    K,
    G: tl.constexpr,
    P: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
    """As int4_gemm with PARTIAL, and then `reduce_splits`; grid (tiles, splits), splits >= 2."""
    int4_gemm(
        codes_ptr,
        rows_ptr,
        part_ptr,
        M,
        splits,
        weight_ptr,
        scale_ptr,
        channel_scale_ptr,
        gain_ptr,
        absorbed_bias_ptr,
        bias_ptr,
        N,
        K,
        G=G,
        P=P,
        TILE_N=TILE_N,
        BLOCK_N=BLOCK_N,
        BLOCK_M=BLOCK_M,
        PARTIAL=True,
        GROUP_M=GROUP_M,
        EVEN_K=EVEN_K,
        HAS_BIAS=HAS_BIAS,
        ASM=ASM,
        STAGES=STAGES,
        UNROLL=UNROLL,
        JOINED=JOINED,
        TWO_LEVEL=TWO_LEVEL,
        PDL=PDL,
    )
    # One thread draws the number: the sums of all others must be written by then.
    tl.debug_barrier()
    number = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if number == splits - 1:
        tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_N, BLOCK_M, GROUP_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        PART_M: tl.constexpr = min(BLOCK_M, ADDED_M)
        for first in tl.static_range(0, BLOCK_M, PART_M):
            m = tile_m * BLOCK_M + first + tl.arange(0, PART_M)
            exists = (n < N)[:, None] & (m < M)[None, :]
            acc = tl.zeros((BLOCK_N, PART_M), dtype=part_ptr.dtype.element_ty)
            for part in tl.range(0, splits, num_stages=1):
                part_ptrs = part_ptr + (part * M + m)[None, :].to(tl.int64) * N + n[:, None]
                acc += tl.load(part_ptrs, mask=exists, other=0, cache_modifier=".cg")
            gain, constant = output_terms(m, n, rows_ptr, gain_ptr, absorbed_bias_ptr, M, N)
            write_output(acc, gain, constant, m, n, channel_scale_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS, TWO_LEVEL)
        tl.store(counter_ptr + tl.program_id(0), 0)
