"""Refuses vLLM's weight checker, which looks at parameters: the tensors of quantized layers are buffers.

It would call two different checkpoints equal, and a reset would leave every quantized layer as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

# Methods of vLLM's worker, which not every version has.
_METHODS = ("compute_weight_checksums", "reset_weights")
# Mark of the functions that refuse.
_MARK = "refuses_quantized"


def patch_weight_checker(methods: tuple[type, ...]) -> None:
    """Let vLLM's worker refuse its weight checker for a model with layers of one of `methods`."""
    # Imported here, in a worker: it imports vLLM's model runner.
    from vllm.v1.worker.gpu_worker import Worker

    for name in _METHODS:
        original = getattr(Worker, name, None)
        if original is not None and not hasattr(original, _MARK):
            setattr(Worker, name, _refusing(original, methods))


def _refusing(original: Callable[..., Any], methods: tuple[type, ...]) -> Callable[..., Any]:
    @functools.wraps(original)
    def refuse(self: Any, *args: Any, **settings: Any) -> Any:
        modules = self.model_runner.get_model().modules()
        if any(isinstance(getattr(module, "quant_method", None), methods) for module in modules):
            raise MorphoQuantError(
                "vLLM's weight checker does not see the weights of quantized layers; compare the checkpoints' files "
                "with `morphoquant verify`"
            )
        return original(self, *args, **settings)

    setattr(refuse, _MARK, True)
    return refuse
