"""Each way of running one layer's experts on a CPU, as a function of x, the weights and the ids of its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import experts as cpu_experts
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord

# text, image, video, audio, any, massive.
ROWS = 6
BFLOAT16 = "vLLM bf16"


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer of experts."""

    name: str
    experts: int
    chosen: int  # by each token
    hidden: int
    between: int


@dataclass(frozen=True)
class Way:
    """A function of x [M, K], topk_weights and topk_ids [M, T], and the bytes that its weights take."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    size: int


QWEN3_OMNI = Layer("Qwen3-Omni-30B-A3B", 128, 8, 2048, 768)


def generated(layer: Layer, group_size: int, two_level: bool) -> ExpertsRecord:
    """Canonical records with random values, which take as long as calibrated ones. No token is massive.

    The input of down comes in channel order, as calibration leaves it.
    """
    generator = torch.Generator().manual_seed(1)
    count, hidden, between = layer.experts, layer.hidden, layer.between

    def weight(outputs: int, channels: int) -> WeightRecord:
        groups = (count, outputs, channels // group_size)
        return WeightRecord(
            torch.randint(256, (count, outputs, channels // 2), generator=generator, dtype=torch.uint8),
            torch.full(groups, 8, dtype=torch.uint8) if two_level else torch.full(groups, 0.01).bfloat16(),
            torch.full((count, outputs if two_level else 0), 0.00125),
            torch.zeros(count, ROWS, outputs),
        )

    def activation(channels: int, order: Tensor) -> ActivationRecord:
        return ActivationRecord(
            inverse=torch.full((ROWS, channels), 3.0),
            centre=torch.zeros(ROWS, channels),
            mask=torch.rand(ROWS, channels, generator=generator) < 0.5,
            gain=torch.ones(ROWS),
            channel_order=order.int(),
            massive_channel=torch.arange(4, dtype=torch.int32)[None],
            massive_low=torch.full((1, 4), 1e30),
            massive_high=torch.full((1, 4), 2e30),
        )

    each = activation(between, torch.arange(between))
    stacked = ActivationRecord(*(field.expand(count, *field.shape) for field in each))
    return ExpertsRecord(
        weight(2 * between, hidden),
        activation(hidden, torch.randperm(hidden, generator=generator)),
        weight(hidden, between),
        stacked,
    )


def ours(layer: Layer, group_size: int, two_level: bool, tokens: int) -> Way:
    """The kernels as the op calls them, for at most `tokens` tokens of all rows but the massive one."""
    if not cpu.available():
        raise MorphoQuantError("the CPU kernels do not run here; the warning above says why")
    prepared = cpu_experts.prepare(generated(layer, group_size, two_level))
    modality = torch.arange(tokens, dtype=torch.int32) % (ROWS - 1)
    size = sum(part.nbytes for projection in (prepared.gate_up, prepared.down) for part in projection[:3])
    return Way(lambda x, weights, ids: cpu_experts.run(x, modality, weights, ids, prepared), size)


def bfloat16_isa() -> str:
    """The instruction set of vLLM's experts in 16 bit on this machine."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts

    # The first that the machine supports, as vLLM chooses.
    kinds = (X86CPUUnquantizedExperts, CPUUnquantizedExperts)
    return next(kind.isa for kind in kinds if kind._supports_current_device())


def bfloat16(layer: Layer, isa: str) -> Way:
    """vLLM's experts in bfloat16, packed as vLLM packs them when it has loaded a layer."""
    from vllm import _custom_ops

    generator = torch.Generator().manual_seed(1)

    def packed(*shape: int) -> Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for expert in weight:
            expert.normal_(0, 0.02, generator=generator)
        return _custom_ops.cpu_prepack_moe_weight(weight, isa)

    gate_up = packed(layer.experts, 2 * layer.between, layer.hidden)
    down = packed(layer.experts, layer.hidden, layer.between)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _custom_ops.cpu_fused_moe(y, x, gate_up, down, None, None, weights, ids, "silu", isa)
        return y

    return Way(run, gate_up.nbytes + down.nbytes)


def ways(layer: Layer, isa: str, group_sizes: Sequence[int], tokens: int) -> dict[str, Way]:
    """Every way by name: vLLM's with an instruction set, and ours for at most `tokens` tokens."""
    made = {BFLOAT16: bfloat16(layer, isa)}
    for group_size in group_sizes:
        for two_level, name in ((False, ""), (True, " two-level")):
            made[f"MorphoQuant G={group_size}{name}"] = ours(layer, group_size, two_level, tokens)
    return made
