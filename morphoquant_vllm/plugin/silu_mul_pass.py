"""A graph pass for compiled models: the quantizer of down_proj also computes silu(gate) * up. Saves a launch per MLP.

vLLM runs its built-in graph passes and one more, which its compilation config names. The built-in fusions are tied to
vLLM's FP8 and FP4 operators; this pass uses the free slot. Graphs that it does not recognise stay unchanged.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.platforms import current_platform

from morphoquant_vllm import environment, ops

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install(config: VllmConfig, backend: str) -> None:
    """Let vLLM's compiler run the pass for layers of `backend`, if that has a fused op and the environment asks for it.

    It is off by default: vLLM's compiled graph with it has not run on a GPU. A pass that the user named is kept.
    """
    if ops.BACKENDS[backend].silu_mul_linear is not None and environment.fusion():
        passes = config.compilation_config.inductor_compile_config
        passes.setdefault(current_platform.pass_key, SiluMulFusion())


class SiluMulFusion(InductorPass):
    """Graph pass: bound_linear(silu(gate_up[:, :K]) * gate_up[:, K:]) becomes bound_silu_mul_linear(gate_up).

    Holds plain data: vLLM copies it with its configuration.
    """

    def __init__(self) -> None:
        self.matched = 0

    def uuid(self) -> str:
        return self.hash_source(type(self), replacements.__wrapped__)

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.matched = replacements().apply(graph)


@cache
def replacements() -> PatternMatcherPass:
    """The pattern and its replacement, traced as the compiler traces the model. Cached: torch keeps a global list."""

    def pattern(gate_up: Tensor, modality: Tensor, handle: Tensor) -> Tensor:
        # As in vLLM's SiluAndMul; down_proj has no bias in the MLPs that use it.
        half = gate_up.shape[-1] // 2
        x = silu(gate_up[..., :half]) * gate_up[..., half:]
        return ops.bound_linear(x, modality, handle, None)

    def replacement(gate_up: Tensor, modality: Tensor, handle: Tensor) -> Tensor:
        return ops.bound_silu_mul_linear(gate_up, modality, handle, None)

    patterns = PatternMatcherPass(pass_name="morphoquant_silu_mul")
    with FakeTensorMode():
        # Shapes and dtypes are placeholders: torch traces again with those of the graph.
        gate_up = torch.empty(5, 16, dtype=torch.bfloat16)
        modality = torch.empty(5, dtype=torch.int32)
        handle = torch.empty(3, 4)
        register_replacement(pattern, replacement, [gate_up, modality, handle], fwd_only, patterns)
    return patterns
