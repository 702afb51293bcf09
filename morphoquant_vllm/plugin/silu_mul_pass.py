"""silu(gate) * up computed by the quantizer of the layer after it, in compiled models: one launch less for each MLP.

What the pass does not recognise stays as it was. fusion.py says when it runs.
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
    """What is found and what takes its place; traced, as the compiler traces the model. Once: torch keeps a list."""

    def found(gate_up: Tensor, modality: Tensor, handle: Tensor) -> Tensor:
        # As vLLM's SiluAndMul has it; down_proj has no bias of its own in the MLPs that use it.
        half = gate_up.shape[-1] // 2
        x = silu(gate_up[..., :half]) * gate_up[..., half:]
        return ops.bound_linear(x, modality, handle, None)

    def instead(gate_up: Tensor, modality: Tensor, handle: Tensor) -> Tensor:
        return ops.bound_silu_mul_linear(gate_up, modality, handle, None)

    patterns = PatternMatcherPass(pass_name="morphoquant_silu_mul")
    with FakeTensorMode():
        # Shapes and dtypes are placeholders: torch traces again with those that it meets.
        gate_up = torch.empty(5, 16, dtype=torch.bfloat16)
        modality = torch.empty(5, dtype=torch.int32)
        handle = torch.empty(3, 4)
        register_replacement(found, instead, [gate_up, modality, handle], fwd_only, patterns)
    return patterns
