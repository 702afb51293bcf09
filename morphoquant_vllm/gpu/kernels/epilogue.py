"""The epilogue of the matrix kernels: sums to outputs, by gain, scales and absorbed bias of each token's row."""

import triton
import triton.language as tl

# Tokens whose outputs are finished at a time, from sums over all of K.
PART_M = tl.constexpr(32)


@triton.jit
def output_terms(m, n, rows_ptr, gain_ptr, absorbed_bias_ptr, M, N):
    """Gain [BLOCK_M] and absorbed bias [BLOCK_N, BLOCK_M] of the rows of tokens `m` and channels `n`."""
    token_exists = m < M
    rows = tl.load(rows_ptr + m, mask=token_exists, other=0)
    gain = tl.load(gain_ptr + rows, mask=token_exists, other=0.0)
    exists = (n < N)[:, None] & token_exists[None, :]
    return gain, tl.load(absorbed_bias_ptr + rows[None, :] * N + n[:, None], mask=exists, other=0.0)


@triton.jit
def write_output(
    acc,  # [BLOCK_N, BLOCK_M]
    gain,
    constant,
    m,  # [BLOCK_M]
    n,  # [BLOCK_N]
    channel_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
):
    """Write outputs: sums times gain and channel scale, plus absorbed bias and bias."""
    n_exists = n < N
    if TWO_LEVEL:
        acc = acc.to(tl.float32) * tl.load(channel_scale_ptr + n, mask=n_exists, other=0.0)[:, None]
    y = acc * gain[None, :] + constant
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_exists, other=0.0).to(tl.float32)[:, None]
    exists = n_exists[:, None] & (m < M)[None, :]
    tl.store(out_ptr + m[None, :].to(tl.int64) * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def write_parts(
    acc,  # [BLOCK_N, BLOCK_M]
    first_m,
    n,  # [BLOCK_N]
    channel_scale_ptr,
    rows_ptr,
    gain_ptr,
    absorbed_bias_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
):
    """`write_output` for tokens from `first_m` on, TOGETHER at a time to bound its registers."""
    if BLOCK_M > TOGETHER:
        # Both halves lie in the same thread's registers, so no value moves.
        low, high = tl.split(acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1))
        for second in tl.static_range(2):
            write_parts(
                high if second else low,
                first_m + second * (BLOCK_M // 2),
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
                BLOCK_M // 2,
                TOGETHER,
                HAS_BIAS,
                TWO_LEVEL,
            )
    else:
        m = first_m + tl.arange(0, BLOCK_M)
        gain, constant = output_terms(m, n, rows_ptr, gain_ptr, absorbed_bias_ptr, M, N)
        write_output(acc, gain, constant, m, n, channel_scale_ptr, bias_ptr, out_ptr, M, N, HAS_BIAS, TWO_LEVEL)
