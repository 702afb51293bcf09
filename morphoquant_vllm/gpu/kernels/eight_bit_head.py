"""Kernel: lm_head with 8-bit weights, y = scale * sum of codes * x.

A code of at most 127 is exact in bfloat16 and float16, and so is its product with x in float32. The kernel reads one
byte a weight, half of what the 16-bit head reads; with few tokens that is its time.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def eight_bit_head(
    x_ptr,  # [M, K]
    out_ptr,  # [M, N]
    M,
    codes_ptr,  # int8 [N, K]
    scale_ptr,  # float32 [N]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """One tile [BLOCK_N, BLOCK_M] of the logits; grid (tiles of M, tiles of N). EVEN_K: BLOCK_K divides K.

    FLOAT32: both operands become float32, since the interpreter has no product of bfloat16.
    Weights are the first operand: a matrix instruction takes as few as 8 tokens as its second.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    token_exists, output_exists = m < M, n < N
    # Outputs past the end read the last one's weights, so that loads need no mask.
    weight_ptrs = codes_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            codes = tl.load(weight_ptrs + start)
            x = tl.load(x_ptrs + start, mask=token_exists[None, :], other=0.0)
        else:
            inside = start + k < K
            codes = tl.load(weight_ptrs + start, mask=inside[None, :], other=0)
            x = tl.load(x_ptrs + start, mask=inside[:, None] & token_exists[None, :], other=0.0)
        if FLOAT32:
            x = x.to(tl.float32)
        acc = tl.dot(codes.to(x.dtype), x, acc=acc)
    y = acc * tl.load(scale_ptr + n, mask=output_exists, other=0.0)[:, None]
    places = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(places, y.to(out_ptr.dtype.element_ty), mask=output_exists[:, None] & token_exists[None, :])
