"""Bound layers and experts that count their escapes before they multiply.

The counting lies inside the op that serves the layer. So the compiled graph stays as it is, and a CUDA graph records
the counting with the layer. The counts accumulate in tensors on the device, and nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import silu

from morphoquant_vllm import backends
from morphoquant_vllm.numerics.activation import ActivationRecord, is_massive
from morphoquant_vllm.numerics.escape_counts import add_escape_counts
from morphoquant_vllm.numerics.norm import normed

if TYPE_CHECKING:
    from morphoquant_vllm.handles import Bound, BoundExperts
    from morphoquant_vllm.plugin.escape_watch import EscapeWatch


@dataclass
class Gate:
    """Whether, and for how many tokens, the layers count."""

    # The first tokens of the step that are requests' tokens, int64 [] on the device; 0 outside counted steps.
    live: Tensor
    # True in a step of requests that is not counted.
    skips: bool = False


@dataclass(frozen=True)
class Counter:
    """Counts the escapes of one layer's inputs, with the quantizer of its backend."""

    gate: Gate
    counts: Tensor  # int64 [R, len(COLUMNS)]
    backend: str
    activation: list[Tensor]  # prepared for the backend
    massive: tuple[Tensor, Tensor, Tensor]  # channel, low, high

    def count(self, x: Tensor, modality: Tensor) -> None:
        """Add the escapes of x [M, K], with modality int32 [M or more]."""
        if self.gate.skips or not x.shape[0]:
            return
        codes = backends.BACKENDS[self.backend].act_quant(x, modality, self.activation)
        add_escape_counts(self.counts, codes, modality, is_massive(x, *self.massive), self.gate.live)

    def take_intervals(self, record: ActivationRecord) -> None:
        """Recognise massive tokens by the intervals of weights that were loaded again."""
        for old, new in zip(
            self.massive, (record.massive_channel, record.massive_low, record.massive_high), strict=True
        ):
            old.copy_(new)


@dataclass(frozen=True)
class CountedLayer:
    """A bound layer with a counter before it."""

    layer: Bound
    counter: Counter

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        self.counter.count(x, modality)
        return self.layer.linear(x, modality, handle, bias)

    def silu_mul_linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        if not self.counter.gate.skips:
            gate, up = x.chunk(2, dim=1)
            self.counter.count(silu(gate) * up, modality)
        return self.layer.silu_mul_linear(x, modality, handle, bias)

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        handle: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.counter.gate.skips:
            self.counter.count(normed(x, residual, norm_weight, epsilon)[0], modality)
        return self.layer.norm_linear(x, residual, norm_weight, epsilon, modality, handle, bias)


def counter_of_linear(
    watch: EscapeWatch,
    layer: Module,
    name: str,
    *,
    split: bool,
    backend: str,
    prepared: list[Tensor],
    record: ActivationRecord,
) -> Counter | None:
    """The counter of the linear `name`, whose tensors become buffers of the `layer`; None if it does not count.

    `split`: whether ranks share its K. `prepared` is the activation's `record` as the backend has it.
    """
    rank = int(layer.tp_rank)  # type: ignore[arg-type]
    counter = watch.counter(name, rank, split=split, backend=backend, prepared=prepared, record=record)
    if counter is not None:
        # Buffers: vLLM's sleep drops all other tensors that were made while the model was loaded.
        layer.register_buffer("escape_counts", counter.counts, persistent=False)
        layer.register_buffer("escape_live", counter.gate.live, persistent=False)
    return counter


@dataclass(frozen=True)
class CountedExperts:
    """Bound experts with a counter of the one input of gate and up before them."""

    layer: BoundExperts
    counter: Counter

    def experts(self, x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        self.counter.count(x, modality)
        return self.layer.experts(x, modality, topk_weights, topk_ids)
