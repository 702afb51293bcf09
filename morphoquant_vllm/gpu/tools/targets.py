"""GPUs that kernels are compiled for without one at hand, and the compilation itself, as a launch there would do it."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from morphoquant_vllm.gpu.device import OLDEST_PDL
from morphoquant_vllm.gpu.kernels.act_quant import quantize_activation, quantize_in_order, quantize_tokens
from morphoquant_vllm.gpu.kernels.norm_quant import quantize_normed

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Names of 16-bit activations in Triton's signatures.
TYPES = {"bfloat16": "*bf16", "float16": "*fp16"}
# Kernels that do not wait for the kernel before them.
QUANTIZERS = (quantize_activation, quantize_in_order, quantize_tokens, quantize_normed)
# Types of the partial sums of a split K, with group scales and with two-level ones.
SUMS = {False: "*fp32", True: "*i32"}


def pdl(target: str) -> bool:
    """Whether kernels on this target are launched while the one before ends."""
    found = TARGETS[target]
    return found.backend == "cuda" and int(found.arch) >= 10 * OLDEST_PDL


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...], target: str, **options: Any
) -> CompiledKernel:
    """Compile `kernel` for a key of TARGETS.

    `types`: the types of run-time arguments. `aligned`: the pointers and sizes that are multiples of 16 at a launch.
    Without them Triton builds another, slower kernel.
    """
    names = kernel.arg_names
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    dependent = {"launch_pdl": True} if pdl(target) and kernel not in QUANTIZERS else {}
    return triton.compile(source, target=TARGETS[target], options=options | dependent)
