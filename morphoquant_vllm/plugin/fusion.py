"""The graph passes of this plugin, as the one further pass that vLLM's compilation config accepts.

vLLM's fusions are tied to its FP8 and FP4 operators. The passes here run after them, on the remaining graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.platforms import current_platform

from morphoquant_vllm import backends, environment
from morphoquant_vllm.plugin.log import plugin_logger
from morphoquant_vllm.plugin.norm_quant_pass import NormFusion
from morphoquant_vllm.plugin.silu_mul_pass import SiluMulFusion

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = plugin_logger(__name__)


def install(config: VllmConfig, backend: str) -> None:
    """Let vLLM's compiler run the passes for layers of `backend` if it has fused kernels and the environment asks.

    Off by default, since vLLM's compiled graph with them has not run on a GPU. A pass that the user named stays.
    With LoRA they are switched off.
    """
    if backends.BACKENDS[backend].silu_mul_linear is None or not environment.fusion():
        return
    if config.lora_config is not None:
        logger.warning_once(
            "MorphoQuant: MORPHOQUANT_FUSION is off: adapters (LoRA) read inputs that fused kernels do not write"
        )
    else:
        config.compilation_config.inductor_compile_config.setdefault(current_platform.pass_key, Fusions())


class Fusions(InductorPass):
    """All graph passes. Holds plain data: vLLM copies it with its configuration."""

    def __init__(self) -> None:
        self.silu_mul, self.norm = SiluMulFusion(), NormFusion()

    def uuid(self) -> str:
        return self.hash_source(type(self), self.silu_mul.uuid(), self.norm.uuid())

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.silu_mul(graph)
        self.norm(graph)
