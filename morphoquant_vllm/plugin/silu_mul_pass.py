"""A graph pass for compiled models: the quantizer of down_proj also computes silu(gate) * up. Saves a launch per MLP.

Graphs that the pass does not recognise stay unchanged. `fusion` installs it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from vllm.compilation.passes.inductor_pass import InductorPass

from morphoquant_vllm import ops


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
