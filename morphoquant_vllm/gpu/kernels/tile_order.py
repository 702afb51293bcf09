"""The order in which the programs of a product take the tiles of its output.

A band of GROUP_M token tiles shares a tile of weights before the next one is read.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of tokens and the tile of channels of program `pid`."""
    token_tiles = tl.cdiv(M, BLOCK_M)
    channel_tiles = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * channel_tiles)
    # The last band may have fewer tiles.
    band_tiles = min(token_tiles - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * channel_tiles)
    return band * GROUP_M + within % band_tiles, within // band_tiles
