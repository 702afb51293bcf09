"""Kernel: unpacks a layer with two-level scales into int8: each weight is exactly q * level.

    packed: 128 rows of a turn of 128 channels       int8, row-major [N', K']
      tile 2t      128 rows of 32 bytes  --+           row n: | low 2t | high 2t | low 2t + 1 | high 2t + 1 |
      tile 2t + 1  128 rows of 32 bytes  --+                  each 32 bytes, together 128 in a row
      levels       128 words of 4 bytes: a byte for each of these quarters of a row

N' is N rounded up to 128, K' is K rounded up to 128. Padding has level 0, so it becomes 0.

A thread loads 16 bytes of a row. It stores their low nibbles as 16 bytes and their high ones as 16 bytes. All three
have the same layout, so nothing passes through shared memory.
"""

import triton
import triton.language as tl

from morphoquant_vllm.gpu.kernels.gemm_two_level import high_times_level, low_times_level
from morphoquant_vllm.gpu.kernels.pdl import let_next_start, wait_for_previous


@triton.jit
def unpack_int8(
    weight_ptr,  # int8 [N'/TILE_N, K'/P, TILE_N, P/2]
    level_ptr,  # int32 [K'/2P, N'], words of levels; see layout.py
    out_ptr,  # int8 [N', K'], written
    padded_n,
    turns,
    P: tl.constexpr,
    TILE_N: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILE_N rows of one turn of 2P channels; grid (N'/TILE_N * turns). `turns` is K'/2P."""
    let_next_start(PDL)
    HALF: tl.constexpr = P // 2
    # A program continues the lines of the program before it.
    tile_n = tl.program_id(0) // turns
    turn = tl.program_id(0) % turns
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    row = tl.arange(0, TILE_N)[:, None] * HALF
    half = tl.arange(0, HALF)[None, :]
    weight_ptrs = weight_ptr + tl.program_id(0).to(tl.int64) * (2 * TILE_N * HALF) + row + half
    out_ptrs = out_ptr + n[:, None].to(tl.int64) * (turns * (2 * P)) + turn * (2 * P) + half
    # The kernel before may still read the weights of the previous layer, which this kernel overwrites.
    wait_for_previous(PDL)
    levels = tl.load(level_ptr + turn * padded_n + n)
    for odd in tl.static_range(2):
        packed = tl.load(weight_ptrs + odd * (TILE_N * HALF))
        low = low_times_level(packed, (levels >> (16 * odd)) & 0xFF, ASM)
        high = high_times_level(packed, (levels >> (16 * odd + 8)) & 0xFF, ASM)
        tl.store(out_ptrs + odd * P, low)
        tl.store(out_ptrs + (odd * P + HALF), high)
