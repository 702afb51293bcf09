"""Options of vLLM that move weights out of a GPU's memory, and that quantized layers do not follow."""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod

# Mark of the function that refuses.
_MARK = "refuses_level_two"


def refuse_offload(config: VllmConfig | None) -> None:
    """Refuse an engine that is told to keep weights on the CPU: quantized layers are laid out on the GPU anew."""
    # Older versions of vLLM lack one of these or both.
    settings: Any = getattr(config, "offload_config", None)
    kept = getattr(getattr(settings, "uva", None), "cpu_offload_gb", 0)
    groups = getattr(getattr(settings, "prefetch", None), "offload_group_size", 0)
    if kept > 0 or groups > 0:
        raise MorphoQuantError(
            "--cpu-offload-gb and --offload-group-size do not move quantized layers off the GPU; serve without them, "
            "on a larger GPU or with --tensor-parallel-size"
        )


def patch_sleep() -> None:
    """Let vLLM's worker refuse sleep level 2 for a model with quantized experts.

    vLLM saves a model's buffers before it drops the memory in which weights lie. Quantized linears are buffers. The
    tensors of experts are not, and they are not loaded again into a running engine. Nor are the counters of tiles that
    add their splits.
    """
    # Imported here, in a worker: it imports vLLM's model runner.
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.sleep
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def sleep(self: Any, level: int = 1) -> None:
        modules = self.model_runner.model.modules() if level > 1 else ()
        if any(isinstance(getattr(module, "quant_method", None), MorphoQuantExpertsMethod) for module in modules):
            raise MorphoQuantError(
                f"sleep level {level} would lose the weights of quantized experts; sleep with level 1, or end the "
                "server"
            )
        if level > 1 and current_platform.is_cuda_alike() and backends.has_counters():
            raise MorphoQuantError(
                f"sleep level {level} would lose the counters of tiles with `adds_splits`; sleep with level 1, or "
                "serve without MORPHOQUANT_TILES"
            )
        original(self, level)

    setattr(sleep, _MARK, True)
    Worker.sleep = sleep
