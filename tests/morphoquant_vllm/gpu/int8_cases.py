"""What the interpreter process does with the int8 path: unpack a layer, multiply, compare with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from morphoquant_vllm.gpu import layout
from morphoquant_vllm.gpu.tiles import Int8Tile
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics.limits import MAX_LEVEL
from morphoquant_vllm.numerics.weights import times_group
from tests.morphoquant_vllm.gpu.cases import ROWS, Case, layer

# What the workspace holds before a layer is unpacked, and after its end.
FILLING = 77


@dataclass(frozen=True)
class Int8Agreement:
    """How unpacked weights, sums and outputs lie beside the reference's."""

    weights_equal: bool  # and zeros to the end of the last tile, and nothing written beyond
    sums_equal: bool  # over all of K, read out by gains and scales of 1; the largest there is among them
    output_error: float  # largest difference over what output_bound allows; over 1 is too much


def tile_of(case: Case, descriptors: bool, block_k: int = 64) -> Int8Tile:
    """The case's sizes as a tile of the int8 path."""
    return Int8Tile(1, case.block_n, case.block_m, block_k, 4, 2, descriptors, False, 1, "test")


def compare(case: Case, descriptors: bool, block_k: int = 64) -> Int8Agreement:
    """Run both kernels on a random layer with two-level scales, K <= 1024."""
    from morphoquant_vllm.gpu import int8_path

    weight, record = layer(case)
    weight.codes[0], weight.scale[0] = 0, MAX_LEVEL
    generator = torch.Generator().manual_seed(case.tokens)
    codes = torch.randint(-128, 128, (case.tokens, case.in_features), generator=generator, dtype=torch.int8)
    # The largest sum: every product is -128 * -8 * 16.
    codes[0] = -128
    rows = torch.randint(ROWS, (case.tokens,), generator=generator, dtype=torch.int32)
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    prepared, tile = layout.prepare_weight(weight), tile_of(case, descriptors, block_k)
    size = int8_path.workspace_bytes(prepared)
    workspace = torch.full((size + 256,), FILLING, dtype=torch.int8)
    int8_path.unpack(prepared, workspace, inline_assembly=False)

    expected_weights = torch.zeros(int8_path.workspace_shape(prepared))
    levels = times_group(weight.codes, weight.scale)
    expected_weights[: case.out_features, : case.in_features] = levels
    weights_equal = torch.equal(int8_path.unpacked(prepared, workspace).float(), expected_weights)
    weights_equal &= bool((workspace[size:] == FILLING).all())

    plain = prepared._replace(
        channel_scale=torch.full((case.out_features,), 16.0), absorbed_bias=torch.zeros(ROWS, case.out_features)
    )
    common = {"codes": codes, "rows": rows, "workspace": workspace, "tile": tile}
    one = torch.full((ROWS,), 1 / 16)
    sums = int8_path.int8_matmul(weight=plain, gain=one, bias=None, dtype=torch.float32, **common)
    expected_sums = codes.double() @ levels.double().T
    assert float(expected_sums[0, 0]) == 2**14 * case.in_features <= 2**24, "a float32 holds every sum"

    # So small that the largest sum is a finite float16.
    gain = record.gain / 4096
    y = int8_path.int8_matmul(weight=prepared, gain=gain / 16, bias=bias, dtype=case.dtype, **common)
    expected = linear_numerics.matmul(codes, rows, weight, gain, bias).to(case.dtype)
    bound = linear_numerics.output_bound(codes, rows, weight, gain, expected)
    return Int8Agreement(
        weights_equal=weights_equal,
        sums_equal=torch.equal(sums.double(), expected_sums),
        output_error=float(((y.double() - expected.double()).abs() / bound).max()),
    )


def refused(change: str) -> None:
    """Unpack into a workspace that is too small or of another type, or a layer of group scales."""
    from morphoquant_vllm.gpu import int8_path

    prepared = layout.prepare_weight(layer(Case(1, 200, 128, 32, two_level=change != "groups"))[0])
    size = 2 * 128 * 128 - (change == "small")
    workspace = torch.zeros(size, dtype=torch.uint8 if change == "wide" else torch.int8)
    int8_path.unpack(prepared, workspace, inline_assembly=False)


def no_tokens() -> tuple[int, ...]:
    """The shape of y of no tokens."""
    from morphoquant_vllm.gpu import int8_path

    case = Case(1, 200, 128, 32, two_level=True)
    weight, record = layer(case)
    prepared = layout.prepare_weight(weight)
    y = int8_path.int8_matmul(
        codes=torch.zeros((0, 128), dtype=torch.int8),
        rows=torch.zeros(0, dtype=torch.int32),
        weight=prepared,
        workspace=torch.zeros(int8_path.workspace_bytes(prepared), dtype=torch.int8),
        gain=record.gain,
        bias=None,
        dtype=case.dtype,
        tile=tile_of(case, descriptors=True),
    )
    return tuple(y.shape)


def self_check(broken: str) -> str:
    """What `selfcheck` says of the path: of sound kernels, or of a wrong weight or output."""
    from morphoquant_vllm.gpu import device, int8_path, selfcheck, tiles

    profile = device.Profile(tiles.architectures()["sm_90"], 4, inline_assembly=False, pdl=False)
    sound = {"unpack": int8_path.unpack, "int8_matmul": int8_path.int8_matmul}

    def wrong_weight(weight: layout.GpuWeight, workspace: torch.Tensor, **settings: Any) -> None:
        sound["unpack"](weight, workspace, **settings)
        workspace[1] += 1

    def wrong_output(**arguments: Any) -> torch.Tensor:
        y = sound["int8_matmul"](**arguments)
        y[-1, -1] += 1 + y[-1, -1].abs() / 16
        return y

    try:
        if broken:
            setattr(int8_path, broken, {"unpack": wrong_weight, "int8_matmul": wrong_output}[broken])
        tile = Int8Tile(1, 64, 32, 128, 4, 2, True, False, 1, broken)
        return selfcheck.problem_of_int8_path(tile, torch.float16, torch.device("cpu"), profile)
    finally:
        int8_path.unpack, int8_path.int8_matmul = sound["unpack"], sound["int8_matmul"]
