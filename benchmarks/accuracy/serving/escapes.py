"""Counts codes outside [-8, 7] inside a running engine, on its real inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from morphoquant_vllm.numerics.activation import escapes


class EscapeCounter:
    """Observes every MorphoQuant linear of a model inside vLLM (eager, in this process); routed experts are none.

    `counts` is {layer: [escaped, all codes]}. It has real tokens only, since an eager step is not padded. A fused layer
    counts once. The layer's quantizer computes the codes a second time.
    """

    def __init__(self, model: nn.Module) -> None:
        from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

        self.counts: dict[str, list[int]] = {}
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, MorphoQuantLinearMethod):
                layer.register_forward_pre_hook(partial(self._count, name, method))

    def take(self) -> dict[str, list[int]]:
        """Return the counts so far, and reset them."""
        taken, self.counts = self.counts, {}
        return taken

    def _count(self, name: str, method: Any, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        from morphoquant_vllm import ops

        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        _, activation = method.records(layer)
        with torch.no_grad():
            codes = ops.act_quant(x, method.modality(layer, x), activation, method.backend)
        count = self.counts.setdefault(name, [0, 0])
        count[0] += int(escapes(codes).sum())
        count[1] += codes.numel()
