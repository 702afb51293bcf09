"""The loop over K of layers with two-level scales: weights times their group's level, in one exact int32 sum.

A step is a tile of packed weights along K. The levels of two steps lie in one word of 32 bits, a byte for each half of
a tile, at any group size. A word is wide enough for an asynchronous copy. So the loop takes two steps a turn, and
shifts words by constants alone. Triton can load packed weights directly in the register layout of the matrix units. It
does if only constants, loads and elementwise operations lie between load and product. Otherwise each turn passes them
through shared memory.
"""

import triton
import triton.language as tl

# Nibbles are u = q + 8 and levels 1 to 16. One 32-bit product and sum computes u * level + (128 - 8 * level) for four
# bytes at once. Each result is 0 to 240, so none carries into the next byte. With the highest bit flipped it is q *
# level in int8. Operands: four packed bytes, their level four times, and 0x01010101 * (128 - 8 * level) four times.
_LOW = tl.constexpr("{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }")
_HIGH = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }"
)
_OPERANDS = tl.constexpr("=r,r,r,r,r,r,r,r,r,r")


@triton.jit
def _offset(level):
    """0x01010101 * (128 - 8 * level) as int32: 0x80808080 - 0x08080808 * level."""
    return -0x7F7F7F80 - level * 0x08080808


@triton.jit
def low_times_level(packed, level, ASM: tl.constexpr):
    """q * level of the low nibbles q + 8, int8 [BLOCK_N, P/2]; packed int8, level int32 [BLOCK_N].

    ASM: NVIDIA instructions, else plain Triton (same values).
    """
    if ASM:
        operands = [packed, level[:, None], _offset(level)[:, None]]
        return tl.inline_asm_elementwise(_LOW, _OPERANDS, operands, dtype=tl.int8, is_pure=True, pack=4)
    level = level.to(tl.int8)[:, None]
    # Both products wrap around; their difference does not.
    return (packed & 15) * level - level * 8


@triton.jit
def high_times_level(packed, level, ASM: tl.constexpr):
    """q * level of the high nibbles; as `low_times_level`."""
    if ASM:
        operands = [packed, level[:, None], _offset(level)[:, None]]
        return tl.inline_asm_elementwise(_HIGH, _OPERANDS, operands, dtype=tl.int8, is_pure=True, pack=4)
    level = level.to(tl.int8)[:, None]
    return ((packed >> 4) & 15) * level - level * 8


@triton.jit
def two_level_sums(
    weight_ptrs,  # int8 [BLOCK_N, P/2], of the first step
    level_ptrs,  # int32 [BLOCK_N], of the first two steps
    code_ptrs,  # int8 [P/2, BLOCK_M], of the first channels; JOINED: [2P, BLOCK_M]
    token_exists,  # [BLOCK_M]
    first,
    last,
    padded_n,
    K,
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
    """The sums of code * q * level over pairs of steps `first` to `last`, int32 [BLOCK_N, BLOCK_M].

    JOINED: the four quarters of a turn are joined into one operand of 2P channels. Their registers already have the
    layout of that operand, so no value moves. Triton waits for each product of warp groups that has an integer
    accumulator (its rule 2.1 for asynchronous products). So on compute capability 9.0 four products cost four waits a
    turn, and one product costs one.
    """
    HALF: tl.constexpr = P // 2
    half = tl.arange(0, HALF)
    turn = tl.arange(0, 2 * P)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for pair in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        levels = tl.load(level_ptrs + pair * padded_n)
        if JOINED:
            exists = token_exists[None, :]
            if not EVEN_K:
                exists = exists & (pair * (2 * P) + turn < K)[:, None]
            codes = tl.load(code_ptrs + pair * (2 * P), mask=exists, other=0)
            packed = tl.load(weight_ptrs + 2 * pair * (TILE_N * HALF))
            odd_packed = tl.load(weight_ptrs + (2 * pair + 1) * (TILE_N * HALF))
            even_parts = tl.join(
                low_times_level(packed, levels & 0xFF, ASM), high_times_level(packed, (levels >> 8) & 0xFF, ASM)
            )
            odd_parts = tl.join(
                low_times_level(odd_packed, (levels >> 16) & 0xFF, ASM),
                high_times_level(odd_packed, (levels >> 24) & 0xFF, ASM),
            )
            weights = tl.join(even_parts, odd_parts).permute(0, 3, 2, 1).reshape(BLOCK_N, 2 * P)
            acc = tl.dot(weights, codes, acc=acc, out_dtype=tl.int32)
        else:
            for odd in tl.static_range(2):
                step = 2 * pair + odd
                packed = tl.load(weight_ptrs + step * (TILE_N * HALF))
                low_exists = token_exists[None, :]
                high_exists = token_exists[None, :]
                if not EVEN_K:
                    low_exists = low_exists & (step * P + half < K)[:, None]
                    high_exists = high_exists & (step * P + HALF + half < K)[:, None]
                low_codes = tl.load(code_ptrs + step * P, mask=low_exists, other=0)
                high_codes = tl.load(code_ptrs + (step * P + HALF), mask=high_exists, other=0)
                low_level = (levels >> (16 * odd)) & 0xFF
                high_level = (levels >> (16 * odd + 8)) & 0xFF
                acc = tl.dot(low_times_level(packed, low_level, ASM), low_codes, acc=acc, out_dtype=tl.int32)
                acc = tl.dot(high_times_level(packed, high_level, ASM), high_codes, acc=acc, out_dtype=tl.int32)
    return acc
