"""Self-check of the kernels of routed experts against the torch reference on this machine's GPU; see selfcheck.py."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import silu

from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import experts, experts_layout, selfcheck
from morphoquant_vllm.gpu.device import Profile
from morphoquant_vllm.gpu.layout import GpuActivation, GpuWeight
from morphoquant_vllm.gpu.tiles import Tile
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord

COUNT, SLOTS = 3, 2
REPORT = "serve on a CPU, and report it with the versions of GPU, driver and Triton"


def _ids(tokens: int) -> torch.Tensor:
    """Experts int32 [M * SLOTS], some of other ranks."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(-1, COUNT + 1, (tokens * SLOTS,), generator=generator, dtype=torch.int32)


@cache
def problem_of_product(tile: Tile, group_size: int, dtype: torch.dtype, device: torch.device, profile: Profile) -> str:
    """The problem of a tile's product of pairs; empty if its outputs lie within the reference's bound."""
    tokens = tile.block_m + 3
    made = [selfcheck.random_product(seed, tokens, group_size, tile.two_level) for seed in range(COUNT)]
    codes, rows, _, gain = made[0]
    weights = [one[2] for one in made]
    stacked = experts_layout.prepare_weights(WeightRecord(*map(torch.stack, zip(*weights, strict=True))))
    ids = _ids(tokens)
    found = experts.multiply(
        codes.to(device),
        rows.to(device),
        SLOTS,
        experts.sorted_blocks(ids.to(device), COUNT, tile.block_m),
        GpuWeight(*(part.to(device) for part in stacked)),
        (gain.expand(COUNT, -1) / 16).contiguous().to(device),
        dtype,
        tile,
        profile,
    ).cpu()
    error = 0.0
    for index, weight in enumerate(weights):
        pairs = (ids == index).nonzero().flatten()
        terms = codes[pairs // SLOTS], rows[pairs // SLOTS], weight, gain
        expected = linear_numerics.matmul(*terms, None).to(dtype)
        allowed = linear_numerics.output_bound(*terms, expected)
        error = max(error, float(((found[pairs].double() - expected.double()).abs() / allowed).max()))
    if error <= 1:
        return ""
    kind = "two-level scales" if tile.two_level else f"group_size {group_size}"
    return (
        f"the kernel of experts for {kind}, tile {tile.block_n}x{tile.block_m}, is off by {error:.3g} times the "
        f"rounding bound on this GPU; name another tile table with {environment.TILES}, or {REPORT}"
    )


@cache
def problem_of_quantizer(
    in_features: int, in_order: bool, dtype: torch.dtype, device: torch.device, profile: Profile
) -> str:
    """The problem of the quantizer of pairs; empty if rows are equal, and all but 1 in 1000 codes.

    Two exponentials may differ in the last bits.
    """
    tokens = 8
    generator = torch.Generator().manual_seed(in_features)
    records = [selfcheck.random_record(in_features, in_order, generator) for _ in range(COUNT)]
    products = (torch.randn((tokens * SLOTS, 2 * in_features), generator=generator) * 4).to(dtype)
    modality = torch.randint(selfcheck.ROWS - 1, (tokens * SLOTS,), generator=generator, dtype=torch.int32)
    prepared = experts_layout.prepare_intermediate(ActivationRecord(*map(torch.stack, zip(*records, strict=True))))
    ids = _ids(tokens)
    on_device = GpuActivation(*(part.to(device) for part in prepared))
    codes, rows = experts.quantize(products.to(device), modality.to(device), ids.to(device), on_device)
    gate, up = products.chunk(2, dim=1)
    h = silu(gate) * up
    differing, total, rows_equal = 0, 1, True
    for index, record in enumerate(records):
        pairs = (ids == index).nonzero().flatten()
        expected_rows = activation_numerics.token_rows(h[pairs], modality[pairs], record)
        expected = activation_numerics.act_quant(h[pairs], expected_rows, record)
        rows_equal = rows_equal and torch.equal(rows.cpu()[pairs], expected_rows)
        differing += int((codes.cpu()[pairs] != expected).sum())
        total += expected.numel()
    if rows_equal and differing <= 1e-3 * total:
        return ""
    return f"the quantizer of experts gives other codes than the reference on this GPU; {REPORT}"


@cache
def problem_of_sum(dtype: torch.dtype, device: torch.device) -> str:
    """The problem of the weighted sum of a token's pairs; empty if it lies within its roundings."""
    tokens, outputs = 5, 176
    generator = torch.Generator().manual_seed(outputs)
    products = torch.randn((tokens * SLOTS, outputs), generator=generator)
    weights = torch.rand((tokens, SLOTS), generator=generator)
    ids, y = _ids(tokens), torch.empty((tokens, outputs), dtype=dtype, device=device)
    experts.add(products.to(device), weights.to(device), ids.to(device), COUNT, y)
    local = ((ids >= 0) & (ids < COUNT)).view(tokens, SLOTS)
    expected = (products.double().view(tokens, SLOTS, -1) * (weights * local).double()[:, :, None]).sum(1)
    # Largest sums are below 8: one unit in the last place is at most 4 times the dtype's epsilon.
    if float((y.cpu().double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps:
        return ""
    return f"the weighted sum of experts is wrong on this GPU; {REPORT}"


def check(name: str, record: ExpertsRecord, dtype: torch.dtype, profile: Profile) -> None:
    """Raise MorphoQuantError if a kernel that the experts can need gives a wrong result; each is tried once."""
    device, two_level = record.down.codes.device, record.down.two_level
    order = record.intermediate.channel_order
    in_order = bool((order == torch.arange(order.shape[1], device=order.device)).all())
    group_size = 2 * record.down.codes.shape[2] // record.down.scale.shape[2]
    problems = [problem_of_quantizer(order.shape[1], in_order, dtype, device, profile), problem_of_sum(dtype, device)]
    problems += [
        problem_of_product(tile, group_size, kind, device, profile)
        for tile in experts.tiles_of(profile.architecture, group_size, two_level)
        for kind in (dtype, torch.float32)
    ]
    for problem in problems:
        if problem:
            raise MorphoQuantError(f"{name}: {problem}")
