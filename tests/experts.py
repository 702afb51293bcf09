"""Random mixtures of experts: the tensors as a checkpoint stores them, and the numerics' record of these."""

import torch
from torch import Tensor

from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts_record
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

# Stored tensors of one expert: gate_proj, up_proj, down_proj.
Expert = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def random_experts(
    count: int,
    hidden: int = 64,
    intermediate: int = 96,
    *,
    group_size: int = 32,
    two_level: bool = True,
    blocks: int = 1,
    seed: int = 0,
) -> list[Expert]:
    """Each expert's stored tensors; `blocks` are the K blocks of down. About half of normal tokens are massive."""
    scheme = TWO_LEVEL_SCHEME if two_level else GROUP_SCHEME
    column = LayerSpec(hidden, intermediate, group_size, "column", "gate_up", scale_scheme=scheme)
    row = LayerSpec(intermediate, hidden, group_size, "row", "down", scale_scheme=scheme)
    spec = QuantizationSpec(layers={"gate_up": column, "down": row}, tensor_parallel=blocks)
    generator = torch.Generator().manual_seed(seed)
    shards = [torch.randn(intermediate, hidden, generator=generator) * hidden**-0.5 for _ in range(2 * count)]
    gates_and_ups = random_group(shards, column, spec, torch.tensor(seed))
    found = []
    for index in range(count):
        weight = torch.randn(hidden, intermediate, generator=generator) * intermediate**-0.5
        down = random_group([weight], row, spec, torch.tensor(seed + index + 1))[0]
        found.append((*gates_and_ups[2 * index : 2 * index + 2], down))
    return found


def record_of(stored: list[Expert]) -> ExpertsRecord:
    """The record of a layer's stored experts."""
    gates, ups, downs = zip(*stored, strict=True)
    return experts_record(
        [weight_of(gate) for gate in gates],
        [weight_of(up) for up in ups],
        activation_of(gates[0]),
        [weight_of(down) for down in downs],
        [activation_of(down) for down in downs],
    )


def random_routing(tokens: int, top: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalized float32 weights and int32 ids of `top` different experts of each token, both [tokens, top]."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, count, generator=generator).softmax(1).topk(top)
    return weights / weights.sum(1, keepdim=True), ids.int()


def random_tokens(tokens: int, hidden: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x float32 [tokens, hidden] with large channels, and the row of each token, of five."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    x[:, ::17] *= 10
    return x, torch.randint(5, (tokens,), generator=generator, dtype=torch.int32)
