"""Refuses vLLM's weight checker, which looks at parameters: the tensors of quantized layers are buffers.

It would call two different checkpoints equal, and a reset would leave every quantized layer as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

# Methods of vLLM's worker, which not every version has.
_METHODS = ("compute_weight_checksums", "reset_weights")
# Mark of the functions that refuse.
_MARK = "refuses_quantized"


def patch_weight_checker() -> None:
    """Let vLLM's worker refuse its weight checker for a model with quantized layers."""
    # Imported here, in a worker: it imports vLLM's model runner.
    from vllm.v1.worker.gpu_worker import Worker

    for name in _METHODS:
        original = getattr(Worker, name, None)
        if original is not None and not hasattr(original, _MARK):
            setattr(Worker, name, _refusing(original))


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def refuse(self: Any, *args: Any, **settings: Any) -> Any:
        methods = [getattr(module, "quant_method", None) for module in self.model_runner.get_model().modules()]
        if any(isinstance(method, MorphoQuantLinearMethod | MorphoQuantExpertsMethod) for method in methods):
            raise MorphoQuantError(
                "vLLM's weight checker does not see the weights of quantized layers; compare the checkpoints' files "
                "with `morphoquant verify`"
            )
        return original(self, *args, **settings)

    setattr(refuse, _MARK, True)
    return refuse
