"""Each way of running one layer's experts on a CPU, as a function of x, the weights and the ids of its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.models.routed import ROWS, Layer, generated
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import experts as cpu_experts
from morphoquant_vllm.errors import MorphoQuantError

BFLOAT16 = "vLLM bf16"


@dataclass(frozen=True)
class Way:
    """A function of x [M, K], topk_weights and topk_ids [M, T], and the bytes that its weights take."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    size: int


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
