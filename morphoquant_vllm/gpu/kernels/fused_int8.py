"""Kernel in Gluon, for compute capability 9.0: int8 codes x int4 weights times levels, unpacked while others multiply.

Triton waits for each integer product before it continues (kernels/gemm_two_level.py). Gluon leaves the wait to the
kernel. So the product of one turn of 128 channels runs while the next turn's weights are unpacked in registers.

    turn t      unpack t in registers | start product t | wait for product t - 1 | start copies of turn t + STAGES - 2
    meanwhile   product t - 1 runs -------------------> |
                                                        | product t runs ------------------------------------------->

A product reads its weights from registers until it has ended. Two successive turns need separate registers, so the loop
is unrolled by two. Layout of weights and levels, sums and epilogue are those of the other kernels. Gluon has no
interpreter; `int4_gemm` with JOINED is the twin that computes the same. The kernel has not run on a GPU, and no tile
table chooses it unless `autotune` has measured it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from morphoquant_vllm.gpu.kernels.gemm_two_level import _HIGH, _LOW, _OPERANDS

# Triton before 3.9 calls it async_copy_global_to_shared.
_copy = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared
_LOW_ASM = gl.constexpr(_LOW.value)
_HIGH_ASM = gl.constexpr(_HIGH.value)
_OPERAND_NAMES = gl.constexpr(_OPERANDS.value)
# Channels of a turn, and of a half tile, which has one level.
_TURN = gl.constexpr(128)
_PART = gl.constexpr(32)
_ROWS = gl.constexpr(128)
# Tokens whose outputs are finished at a time.
_PART_M = gl.constexpr(32)


@gluon.jit
def times_level(packed, level, HIGHER: gl.constexpr):
    """q * level of the low or HIGHER nibbles q + 8, int8 like `packed` [128, 32]; level int32 [128]."""
    ASM: gl.constexpr = _HIGH_ASM if HIGHER else _LOW_ASM
    zeros = gl.full(packed.shape, 0, gl.int32, packed.type.layout)
    offset = -0x7F7F7F80 - level * 0x08080808
    operands = [packed, zeros + level[:, None], zeros + offset[:, None]]
    return gl.inline_asm_elementwise(ASM, _OPERAND_NAMES, operands, dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def unpacked(even, odd, levels, LEFT: gl.constexpr):
    """A turn's weights [128, 128] as left operand, from two tiles in shared memory; no value moves between threads."""
    first, second = even.load(LEFT), odd.load(LEFT)
    even_parts = gl.join(times_level(first, levels & 0xFF, False), times_level(first, (levels >> 8) & 0xFF, True))
    odd_parts = gl.join(
        times_level(second, (levels >> 16) & 0xFF, False), times_level(second, (levels >> 24) & 0xFF, True)
    )
    weights = gl.join(even_parts, odd_parts).permute(0, 3, 2, 1).reshape((_ROWS, _TURN))
    return gl.convert_layout(weights, LEFT, assert_trivial=True)


@gluon.jit
def copy_turn(turn, turns, codes, even, odd, code_ptrs, weight_ptrs, k, K, STAGES: gl.constexpr, EVEN_K: gl.constexpr):
    """Start the copies of a turn into its buffers. After the last turn the group of copies is empty."""
    place = turn % STAGES
    exists = turn < turns
    code_exists = exists if EVEN_K else exists & (turn * _TURN + k < K)[None, :]
    tile: gl.constexpr = _ROWS * _PART
    _copy(codes.index(place), code_ptrs + turn * _TURN, mask=code_exists)
    _copy(even.index(place), weight_ptrs + 2 * turn * tile, mask=exists)
    _copy(odd.index(place), weight_ptrs + (2 * turn + 1) * tile, mask=exists)
    hopper.async_copy.commit_group()


@gluon.jit
def write_parts(
    acc,  # int32 [128, BLOCK_M]
    first_m,
    first_n,
    rows_ptr,
    out_ptr,
    channel_scale_ptr,
    gain_ptr,
    absorbed_bias_ptr,
    bias_ptr,
    M,
    N,
    BLOCK_M: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Write outputs with the operations of epilogue.write_parts, in the same order."""
    if BLOCK_M > _PART_M:
        low, high = gl.split(acc.reshape((_ROWS, 2, BLOCK_M // 2)).permute(0, 2, 1))
        for second in gl.static_range(2):
            write_parts(
                high if second else low,
                first_m + second * (BLOCK_M // 2),
                first_n,
                rows_ptr,
                out_ptr,
                channel_scale_ptr,
                gain_ptr,
                absorbed_bias_ptr,
                bias_ptr,
                M,
                N,
                BLOCK_M // 2,
                HAS_BIAS,
            )
    else:
        # Eight outputs of a token in a row: 16 bytes.
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 8], [0, 1])
        m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        n = first_n + gl.arange(0, _ROWS, gl.SliceLayout(1, OUT))
        token_exists = m < M
        n_exists = n < N
        exists = n_exists[:, None] & token_exists[None, :]
        rows = gl.load(rows_ptr + m, mask=token_exists, other=0)
        gain = gl.load(gain_ptr + rows, mask=token_exists, other=0.0)
        constant = gl.load(absorbed_bias_ptr + rows[None, :] * N + n[:, None], mask=exists, other=0.0)
        sums = gl.convert_layout(acc, OUT).to(gl.float32)
        sums = sums * gl.load(channel_scale_ptr + n, mask=n_exists, other=0.0)[:, None]
        y = sums * gain[None, :] + constant
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n_exists, other=0.0).to(gl.float32)[:, None]
        out_ptrs = out_ptr + m[None, :].to(gl.int64) * N + n[:, None]
        gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=exists)


@gluon.jit
def grid_control(NAME: gl.constexpr):
    """Execute the griddepcontrol instruction NAME of dependent launch; see kernels/pdl.py."""
    gl.inline_asm_elementwise(NAME + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit(do_not_specialize=["M"])
def fused_int8(
    # Arguments that vary from call to call come first.
    codes_ptr,  # int8 [M, K]
    rows_ptr,  # int32 [M]
    out_ptr,  # [M, N]
    M,
    weight_ptr,  # int8 [N'/128, K'/64, 128, 32]
    level_ptr,  # int32 [K'/128, N'], words of levels; see layout.py
    channel_scale_ptr,  # float32 [N], times 16
    gain_ptr,  # float32 [R], divided by 16
    absorbed_bias_ptr,  # float32 [R, N]
    bias_ptr,  # [N] or unused
    N,
    K,
    BLOCK_M: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    """One tile [128, BLOCK_M] of the output, by eight warps; grid (tiles). EVEN_K: 128 divides K; STAGES >= 3."""
    if PDL:
        grid_control("griddepcontrol.launch_dependents")
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    # Each thread copies 16 bytes of codes and of packed weights at a time.
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    PACKED: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [8, 1], [1, 0])
    codes = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, _TURN], gl.NVMMASharedLayout(128, 8, 2))
    # Eight rows of 16 bytes lie in different banks.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(16, 4, 2, [1, 0])
    even = gl.allocate_shared_memory(gl.int8, [STAGES, _ROWS, _PART], swizzled)
    odd = gl.allocate_shared_memory(gl.int8, [STAGES, _ROWS, _PART], swizzled)

    token_tiles = (M + BLOCK_M - 1) // BLOCK_M
    channel_tiles = (N + _ROWS - 1) // _ROWS
    turns = (K + _TURN - 1) // _TURN
    # As kernels/tile_order.py, in Gluon.
    band = gl.program_id(0) // (GROUP_M * channel_tiles)
    band_tiles = gl.minimum(token_tiles - band * GROUP_M, GROUP_M)
    within = gl.program_id(0) % (GROUP_M * channel_tiles)
    first_m = (band * GROUP_M + within % band_tiles) * BLOCK_M
    tile_n = within // band_tiles

    # Token indices past M read the last token again; their outputs are not written.
    m = gl.minimum(first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, CODES)), M - 1)
    k = gl.arange(0, _TURN, gl.SliceLayout(0, CODES))
    code_ptrs = codes_ptr + m.to(gl.int64)[:, None] * K + k[None, :]
    row = gl.arange(0, _ROWS, gl.SliceLayout(1, PACKED))
    byte = gl.arange(0, _PART, gl.SliceLayout(0, PACKED))
    tile: gl.constexpr = _ROWS * _PART
    weight_ptrs = weight_ptr + tile_n.to(gl.int64) * (2 * turns * tile) + row[:, None] * _PART + byte[None, :]
    level_ptrs = level_ptr + tile_n * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, LEFT))
    padded_n = channel_tiles * _ROWS

    if PDL:
        grid_control("griddepcontrol.wait")
    for early in gl.static_range(STAGES - 2):
        copy_turn(early, turns, codes, even, odd, code_ptrs, weight_ptrs, k, K, STAGES, EVEN_K)
    levels = gl.load(level_ptrs)
    product = hopper.warpgroup_mma_init(gl.full([_ROWS, BLOCK_M], 0, gl.int32, PRODUCT))
    # The loop runs at least once. A path around it would set the sums' registers between products, which would
    # serialise them.
    for pair in range(gl.maximum((turns + 1) // 2, 1)):
        for second in gl.static_range(2):
            turn = 2 * pair + second
            # The copies of this turn have ended in every thread, and each warp has waited for product turn - 2.
            hopper.async_copy.wait_group(STAGES - 3)
            hopper.fence_async_shared()
            gl.barrier()
            place = turn % STAGES
            weights = unpacked(even.index(place), odd.index(place), levels, LEFT)
            # After the last turn levels are 0, and so are the weights.
            levels = gl.load(level_ptrs + gl.minimum(turn + 1, turns - 1) * padded_n) * (turn + 1 < turns)
            right = codes.index(place).permute((1, 0))
            product = hopper.warpgroup_mma(weights, right, product, is_async=True)
            product = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[product]))
            # The copies go into the buffers of turn - 2.
            copy_turn(turn + STAGES - 2, turns, codes, even, odd, code_ptrs, weight_ptrs, k, K, STAGES, EVEN_K)
    acc = hopper.warpgroup_mma_wait(0, deps=[product])
    hopper.async_copy.wait_group(0)
    write_parts(
        acc,
        first_m,
        tile_n * _ROWS,
        rows_ptr,
        out_ptr,
        channel_scale_ptr,
        gain_ptr,
        absorbed_bias_ptr,
        bias_ptr,
        M,
        N,
        BLOCK_M,
        HAS_BIAS,
    )
