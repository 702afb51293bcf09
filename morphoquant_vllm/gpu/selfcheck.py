"""Self-check: compares each kernel with the torch reference on this machine's GPU, once in a process.

It runs while the first layer is loaded. Tests in the interpreter and of binaries cannot replace a run on the GPU:
another release of Triton compiles another binary. If a kernel gives a wrong result, its layer is refused. The check
launches kernels as bound layers do (bound.py), so it tests the served launches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import bound_calls, bound_norm, layout, norm_launch
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.product_launch import Product
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, Quantizer
from morphoquant_vllm.gpu.tiles import Int8Tile, Tile
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics import norm
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord
from morphoquant_vllm.numerics.weights import times_group

# Sizes of several turns. N is a multiple of 16 but not of a tile: layers have such sizes, and Triton specialises on 16.
OUT_FEATURES, IN_FEATURES = 176, 768
ROWS = 3
EPSILON = 1e-6


def random_product(
    seed: int, tokens: int, group_size: int, two_level: bool
) -> tuple[torch.Tensor, torch.Tensor, WeightRecord, torch.Tensor]:
    """Random codes int8 [M, K], rows int32 [M], weight of that kind, and gain float32 [R]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (tokens, IN_FEATURES), generator=generator, dtype=torch.int8)
    rows = torch.randint(ROWS, (tokens,), generator=generator, dtype=torch.int32)
    packed = torch.randint(256, (OUT_FEATURES, IN_FEATURES // 2), generator=generator).to(torch.uint8)
    groups = (OUT_FEATURES, IN_FEATURES // group_size)
    channel_scale = torch.zeros(0)
    if two_level:
        scale = torch.randint(1, 17, groups, generator=generator).to(torch.uint8)
        channel_scale = torch.rand(OUT_FEATURES, generator=generator) + 0.5
    else:
        scale = (torch.rand(groups, generator=generator) + 0.5).bfloat16()
    constant = torch.randn((ROWS, OUT_FEATURES), generator=generator)
    gain = torch.rand(ROWS, generator=generator) / 256
    return codes, rows, WeightRecord(packed, scale, channel_scale, constant), gain


@cache
def problem_of_tile(
    tile: Tile, group_size: int, splits: int, dtype: torch.dtype, device: torch.device, profile: Profile
) -> str:
    """The problem of a tile's kernel on `device`; empty if its outputs lie within the reference's bound."""
    codes, rows, weight, gain = random_product(tile.block_n, tile.block_m + 3, group_size, tile.two_level)
    expected = linear_numerics.matmul(codes, rows, weight, gain, None).to(dtype)
    allowed = linear_numerics.output_bound(codes, rows, weight, gain, expected)
    prepared = layout.GpuWeight(*(tensor.to(device) for tensor in layout.prepare_weight(weight)))
    product = Product(prepared, gain.to(device) / 16, profile.inline_assembly, profile.pdl)
    y = bound_calls.multiplied(codes.to(device), rows.to(device), product, dtype, tile, splits)
    error = float(((y.cpu().double() - expected.double()).abs() / allowed).max())
    if error <= 1:
        return ""
    kind = "two-level scales" if tile.two_level else f"group_size {group_size}"
    adding = ", which it adds" if tile.adds_splits and splits > 1 else ""
    return (
        f"the kernel for {kind}, tile {tile.block_n}x{tile.block_m} (warps {tile.warps}, stages {tile.stages}, "
        f"splits {splits}{adding}) is off by {error:.3g} times the rounding bound on this GPU; "
        f"name another tile table with {environment.TILES}, or serve on a CPU, and report it with the versions of GPU, "
        "driver and Triton"
    )


@cache
def problem_of_int8_path(tile: Int8Tile, dtype: torch.dtype, device: torch.device, profile: Profile) -> str:
    """The problem of the int8 path on `device`; empty if weights are equal and outputs lie within the bound."""
    codes, rows, weight, gain = random_product(tile.block_n, tile.block_m + 3, layout.UNIT_K, two_level=True)
    expected = linear_numerics.matmul(codes, rows, weight, gain, None).to(dtype)
    allowed = linear_numerics.output_bound(codes, rows, weight, gain, expected)
    prepared = layout.GpuWeight(*(tensor.to(device) for tensor in layout.prepare_weight(weight)))
    product = Product(prepared, gain.to(device) / 16, profile.inline_assembly, profile.pdl)
    y, matrix = bound_calls.multiplied_in_int8(codes.to(device), rows.to(device), product, dtype, tile)
    differing = 0.0
    if matrix is not None:
        unpacked = matrix[:OUT_FEATURES, :IN_FEATURES].cpu()
        differing = float((unpacked != times_group(weight.codes, weight.scale)).float().mean())
    error = float(((y.cpu().double() - expected.double()).abs() / allowed).max())
    if not differing and error <= 1:
        return ""
    return (
        f"the int8 path, tile {tile.block_n}x{tile.block_m} (warps {tile.warps}, stages {tile.stages}), is off by "
        f"{error:.3g} times the rounding bound on this GPU, with {100 * differing:.3g} % of its weights wrong; "
        f"name a tile table without it with {environment.TILES}, or serve on a CPU, and report it with the versions of "
        "GPU, driver and Triton"
    )


@cache
def problem_of_quantizer(
    in_features: int,
    in_order: bool,
    tokens: int,
    silu_mul: bool,
    dtype: torch.dtype,
    device: torch.device,
    profile: Profile,
) -> str:
    """The problem of the quantizer at these sizes; empty if codes and rows equal the reference's.

    With silu(gate) * up 1 code in 1000 may differ, since two exponentials may differ in the last bits.
    """
    generator = torch.Generator().manual_seed(tokens)
    record = random_record(in_features, in_order, generator)
    x = (torch.randn((tokens, in_features * (1 + silu_mul)), generator=generator) * 4).to(dtype)
    modality = torch.randint(ROWS - 1, (tokens,), generator=generator, dtype=torch.int32)
    prepared = layout.GpuActivation(*(tensor.to(device) for tensor in layout.prepare_activation(record)))
    quantizer = Quantizer(prepared, silu_mul, profile.pdl, profile.units)
    found = bound_calls.quantized(x.to(device), modality.to(device), quantizer)
    if silu_mul:
        gate, up = x.chunk(2, dim=1)
        x = torch.nn.functional.silu(gate) * up
    rows = activation_numerics.token_rows(x, modality, record)
    expected = activation_numerics.act_quant(x, rows, record)
    differing = float((found[0].cpu() != expected).float().mean())
    if torch.equal(found[1].cpu(), rows) and differing <= (1e-3 if silu_mul else 0):
        return ""
    return (
        f"the quantizer of {in_features} channels gives other codes than the reference on this GPU "
        f"({100 * differing:.3g} % of them); serve on a CPU, and report it with the versions of GPU, driver and Triton"
    )


@cache
def problem_of_norm_quantizer(
    in_features: int,
    in_order: bool,
    tokens: int,
    add: bool,
    dtype: torch.dtype,
    device: torch.device,
    profile: Profile,
) -> str:
    """The problem of the kernel that norms and quantizes x, or x + residual with `add`; empty if there is none.

    The norm may differ from the reference's by two units in the last place, in 1 of 1000 values. From that norm, codes
    and rows must equal the reference's. The new residual must equal the reference's too.
    """
    generator = torch.Generator().manual_seed(tokens)
    record = random_record(in_features, in_order, generator)
    x, residual = (torch.randn((2, tokens, in_features), generator=generator) * 4).to(dtype)
    weight = (torch.rand(in_features, generator=generator) + 1).to(dtype)
    modality = torch.randint(ROWS - 1, (tokens,), generator=generator, dtype=torch.int32)
    prepared = layout.GpuActivation(*(tensor.to(device) for tensor in layout.prepare_activation(record)))
    values = torch.empty_like(x, device=device)
    quantizer = norm_launch.NormQuantizer(prepared, profile.pdl, profile.units)
    inputs = (x.to(device), residual.to(device) if add else None, weight.to(device), EPSILON, modality.to(device))
    found = norm_launch.norm_quantize(*inputs, quantizer, values)
    served = bound_norm.norm_quantized(*inputs, quantizer)
    normed, expected, total = values.cpu(), norm.rms_norm(x, weight, EPSILON), None
    if add:
        expected, total = norm.add_rms_norm(x, residual, weight, EPSILON)
    off = (normed.float() - expected.float()).abs() > 2 * torch.finfo(dtype).eps * expected.float().abs()
    rows = activation_numerics.token_rows(normed, modality, record)
    codes = activation_numerics.act_quant(normed, rows, record)
    same = all(torch.equal(one[0].cpu(), codes) and torch.equal(one[1].cpu(), rows) for one in (found, served))
    same = same and (total is None or all(torch.equal(one[2].cpu(), total) for one in (found, served)))  # type: ignore[union-attr]
    differing = float((normed != expected).float().mean())
    if same and differing <= 1e-3 and not bool(off.any()):
        return ""
    return (
        f"the kernel that norms and quantizes {in_features} channels gives other codes than the reference on this GPU "
        f"({100 * differing:.3g} % of its norms differ); serve without {environment.FUSION}, and report it with the "
        "versions of GPU, driver and Triton"
    )


def random_record(in_features: int, in_order: bool, generator: torch.Generator) -> ActivationRecord:
    """A quantizer of ROWS rows with random tables."""
    order = torch.arange(in_features) if in_order else torch.randperm(in_features, generator=generator)
    return ActivationRecord(
        inverse=torch.rand((ROWS, in_features), generator=generator) * 4 + 0.5,
        centre=torch.randn((ROWS, in_features), generator=generator) / 4,
        mask=torch.rand((ROWS, in_features), generator=generator) < 0.5,
        gain=torch.ones(ROWS),
        channel_order=order.int(),
        # Layers have this many intervals, and Triton compiles a kernel for their number. Half of the tokens are
        # massive.
        massive_channel=torch.arange(4, dtype=torch.int32)[None],
        massive_low=torch.full((1, 4), -4.0),
        massive_high=torch.full((1, 4), 8.0),
    )


def check(weight: layout.GpuWeight, activation: layout.GpuActivation, dtype: torch.dtype, profile: Profile) -> None:
    """Raise MorphoQuantError if a kernel that the layer can need gives a wrong result; each is tried once."""
    device = weight.codes.device
    group_size, two_level = layout.group_size_of(weight), weight.two_level
    problems = [
        problem_of_quantizer(activation.in_features, activation.in_order, tokens, silu_mul, dtype, device, profile)
        for tokens in (3, WHOLE_TOKENS)
        for silu_mul in (False, True)
    ]
    if environment.fusion() and activation.in_features <= norm_launch.WIDEST_NORM:
        problems += [
            problem_of_norm_quantizer(activation.in_features, activation.in_order, tokens, add, dtype, device, profile)
            for tokens in (3, WHOLE_TOKENS)
            for add in (False, True)
        ]
    problems += [
        problem_of_tile(tile, group_size, splits, dtype, device, profile)
        for tile in profile.architecture.tiles
        if tile.serves(group_size, two_level)
        for splits in sorted({1, min(tile.max_splits, 2)})
    ]
    # While another stream has the counters, such a tile is served by two launches, which are checked too.
    problems += [
        problem_of_tile(replace(tile, adds_splits=False), group_size, 2, dtype, device, profile)
        for tile in profile.architecture.tiles
        if tile.serves(group_size, two_level) and tile.adds_splits and tile.max_splits > 1
    ]
    int8_tile = profile.architecture.served_int8_tile(two_level)
    if int8_tile is not None:
        problems.append(problem_of_int8_path(int8_tile, dtype, device, profile))
    for problem in problems:
        if problem:
            raise MorphoQuantError(problem)
