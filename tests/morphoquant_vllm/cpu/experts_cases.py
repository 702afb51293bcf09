"""Random experts for the CPU kernels, and the comparison with the dense kernels and the torch reference."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import experts as cpu_experts
from morphoquant_vllm.cpu.build import Kernels
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts, experts_bound, routed, weighted_sum
from morphoquant_vllm.numerics.linear import WeightRecord
from tests.morphoquant_vllm.cpu.cases import case, tokens_of

# E, K, I, G: every group size; outputs below, at and past blocks of 16 and panels.
SHAPES = ((5, 64, 32, 32), (3, 192, 64, 64), (4, 256, 128, 128), (9, 96, 160, 32))
# M, T: one pair, fewer and more experts than an ordinary batch has, and more tokens of an expert than unpack a strip.
ROUTINGS = ((1, 1), (1, 3), (5, 2), (17, 3), (70, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts_case(count: int, hidden: int, between: int, group_size: int, two_level: bool) -> ExpertsRecord:
    """Random records of a layer, as `case` makes those of a linear; some inputs of down are massive."""
    scheme = "two_level" if two_level else "group"
    layers = [case(2 * between, hidden, group_size, scheme, seed) for seed in range(count)]
    downs = [case(hidden, between, group_size, scheme, seed + count) for seed in range(count)]
    gate_up, inputs = zip(*layers, strict=True)
    down, intermediate = zip(*downs, strict=True)
    # gate and up of a real layer's size, or silu(gate) * up would leave float16's range.
    gate_up = tuple(weight._replace(absorbed_bias=weight.absorbed_bias / 30) for weight in gate_up)
    return ExpertsRecord(
        _stacked(gate_up, WeightRecord), inputs[0], _stacked(down, WeightRecord), _in_order(intermediate)
    )


def _stacked(records: tuple, kind: type) -> WeightRecord | ActivationRecord:
    return kind(*(torch.stack(fields) for fields in zip(*records, strict=True)))


def _in_order(records: tuple[ActivationRecord, ...]) -> ActivationRecord:
    """Stacked; the channels of the first expert come in order, those of the others do not."""
    stacked = _stacked(records, ActivationRecord)
    stacked.channel_order[0] = torch.arange(stacked.channel_order.shape[1])
    return stacked


def routing_of(tokens: int, slots: int, count: int) -> tuple[Tensor, Tensor]:
    """Random weights, some negative, and ids [tokens, slots], int32 or int64; some of other ranks, some twice."""
    generator = torch.Generator().manual_seed(tokens + slots)
    ids = torch.randint(-1, count + 1, (tokens, slots), generator=generator)
    # Most tokens choose one expert: it has more than the others, and the last one none.
    ids[torch.rand(ids.shape, generator=generator) < 0.6] = 1
    ids[ids == count - 1] = 0
    return torch.randn(tokens, slots, generator=generator), ids.int() if tokens % 2 else ids


def compare_case(record: ExpertsRecord, tokens: int, slots: int, dtype: torch.dtype, library: Kernels) -> None:
    """Assert that gate and up are those of the dense kernels to the last bit, and the layer is within its bound."""
    hidden = record.input.channel_order.numel()
    x, modality = tokens_of(tokens, hidden, dtype)
    weights, ids = routing_of(tokens, slots, record.size)
    prepared = cpu_experts.prepare(record)
    products, pairs = cpu_experts.gate_up(x, modality, ids, prepared, library)
    local = (ids >= 0) & (ids < record.size)
    assert torch.equal(pairs.place >= 0, local) and products.shape[0] == int(local.sum())
    for index, chosen, slot in routed(ids, record.size):
        dense = cpu.prepare(record.expert(index)[0], record.input)
        alone = cpu.linear(x[chosen], modality[chosen], *dense, None, library)
        assert torch.equal(products[pairs.place[chosen, slot].long()], alone)
    gate, up = products.chunk(2, dim=1)
    h = x.new_zeros(tokens, slots, gate.shape[1])
    h[local] = (silu(gate) * up)[pairs.place[local].long()]
    expected = weighted_sum(h, modality[:tokens], weights, ids, record).to(dtype)
    y = cpu_experts.run(x, modality, weights, ids, prepared, library)
    assert y.dtype is dtype and y.shape == x.shape
    bound = experts_bound(h, modality[:tokens], weights, ids, record, expected)
    near = ((y.double() - expected.double()).abs() <= bound) | (y == expected)
    assert bool(near.all()), f"{int((~near).sum())} of {near.numel()} outputs outside the bound"
    if dtype is torch.float32:
        # The whole layer: codes of h rarely differ, since gate and up differ by float32 roundings.
        whole = experts(x, modality[:tokens], weights, ids, record)
        assert float((y - whole).norm()) <= 1e-3 * float(whole.norm())


def compare_experts(library: Kernels) -> None:
    """`compare_case` over shapes, schemes of scales, routings and dtypes."""
    for shape_index, shape in enumerate(SHAPES):
        for two_level in (False, True):
            record = experts_case(*shape, two_level)
            for index, (tokens, slots) in enumerate(ROUTINGS):
                compare_case(record, tokens, slots, DTYPES[(index + shape_index) % 3], library)
