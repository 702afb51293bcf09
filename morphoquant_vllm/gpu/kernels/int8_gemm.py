"""Kernel: int8 codes x int8 weights q * level in exact int32 over all of K, then the epilogue of the other kernels.

It serves many tokens of layers with two-level scales, after `unpack_int8`. Weights are the left operand here too, and
the accumulator is [N, M]. So sums, order of float32 operations and bound are those of the other kernels.

DESCRIPTORS: operands are tensor descriptors, which copy whole blocks without a thread's help and read zeros outside the
tensor. The host makes them (int8_path.py). A descriptor made in the kernel would need memory from Triton's global
allocator at every launch. Every program would need a store, a fence and a wait. A descriptor made by the host is an
argument of the launch, and a captured CUDA graph keeps it by value. The descriptor of the workspace stays the same from
call to call. On GPUs without descriptors operands are pointers, and the loop copies asynchronously, 16 bytes a thread.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.epilogue import PART_M, write_parts
from morphoquant_vllm.gpu.kernels.pdl import let_next_start, wait_for_previous
from morphoquant_vllm.gpu.kernels.tile_order import tile_of


@triton.jit(do_not_specialize=["M"])
def int8_gemm(
    # Arguments that vary from call to call come first.
    codes,  # int8 [M, K]; DESCRIPTORS: in blocks [BLOCK_M, BLOCK_K]
    rows_ptr,  # int32 [M]
    out_ptr,  # [M, N]
    M,
    weights,  # int8 [N', K'], N and K rounded up; DESCRIPTORS: in blocks [BLOCK_N, BLOCK_K]
    channel_scale_ptr,  # float32 [N], times 16
    gain_ptr,  # float32 [R], divided by 16
    absorbed_bias_ptr,  # float32 [R, N]
    bias_ptr,  # [N] or unused
    N,
    K,
    padded_k,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the output; grid (tiles). EVEN_K: BLOCK_K divides K. `padded_k` is K'."""
    let_next_start(PDL)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_N, BLOCK_M, GROUP_M)
    first_m = tile_m * BLOCK_M
    first_n = tile_n * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    if DESCRIPTORS:
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            left = weights.load([first_n, start])
            right = codes.load([first_m, start])
            acc = tl.dot(left, right.T, acc=acc, out_dtype=tl.int32)
    else:
        # Two products a turn: with one, Triton 3.9 would carry the next operands from turn to turn byte by byte.
        HALF: tl.constexpr = BLOCK_K // 2
        k = tl.arange(0, HALF)
        token_exists = (m < M)[None, :]
        # The padding of the workspace can be read: BLOCK_N and BLOCK_K divide its sizes.
        weight_ptrs = weights + n[:, None].to(tl.int64) * padded_k + k[None, :]
        code_ptrs = codes + m[None, :].to(tl.int64) * K + k[:, None]
        for turn in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            for second in tl.static_range(2):
                start = turn + second * HALF
                exists = token_exists
                if not EVEN_K:
                    exists = exists & (start + k < K)[:, None]
                left = tl.load(weight_ptrs + start)
                right = tl.load(code_ptrs + start, mask=exists, other=0)
                acc = tl.dot(left, right, acc=acc, out_dtype=tl.int32)
    write_parts(
        acc,
        first_m,
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
        min(BLOCK_M, PART_M),
        HAS_BIAS,
        True,
    )
