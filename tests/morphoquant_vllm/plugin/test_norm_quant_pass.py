"""The graph pass of RMSNorm: what it fuses, what it leaves alone, and that outputs stay the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from morphoquant_vllm import ops
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.plugin.norm_quant_pass import NormFusion
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, G = 64, 32
EPSILON = 1e-5


@pytest.fixture(scope="module")
def handle() -> Tensor:
    """Of a layer K x K that is bound to the reference, which has no fused kernel."""
    layer = LayerSpec(K, K, G, "column", "layer")
    matrix = torch.randn(K, K, generator=torch.Generator().manual_seed(1))
    (tensors,) = random_group([matrix], layer, QuantizationSpec(layers={"layer": layer}), torch.tensor(2))
    records = list(weight_of(tensors)), list(activation_of(tensors))
    return ops.bind(*records, None, torch.bfloat16, "reference")


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and residual, of which the number of tokens alone is dynamic, the norm's weight, rows of more tokens."""
    generator = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, tokens, K, generator=generator).bfloat16() * 3
    weight = (torch.rand(K, generator=generator) + 0.5).bfloat16()
    for part in (x, residual):
        torch._dynamo.mark_dynamic(part, 0)
    return x, residual, weight, torch.randint(6, (16,), generator=generator, dtype=torch.int32)


def compiled(function: Callable, pass_: NormFusion) -> tuple[Callable, list[str]]:
    """`function` traced as vLLM's compiler traces it, and passed through the pass; and the ops of its graph."""
    targets: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: object) -> Callable:
        pass_(module.graph)
        module.graph.lint()
        module.recompile()
        targets[:] = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        return module

    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    return torch.compile(function, backend=backend, fullgraph=True), targets


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.vllm_ir.rms_norm(x, weight, EPSILON)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, EPSILON)


@pytest.fixture(scope="module", autouse=True)
def _vllm_s_operators() -> None:
    from vllm import ir  # noqa: F401


def test_norms_before_linears_become_part_of_them(handle: Tensor) -> None:
    """As in a decoder: the first norm has no residual, the last one no linear of ours after it."""

    def decoder(x: Tensor, other: Tensor, weight: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        bias = weight * 2
        residual = x
        y = ops.bound_linear(norm(x, weight), modality, handle, bias)
        y, residual = add_norm(y, residual, weight)
        y = ops.bound_linear(y, modality, handle, None)
        y, residual = add_norm(y * 2, residual, weight)
        y = ops.bound_linear(y, modality, handle, None)
        return add_norm(y, residual, weight)

    with torch.no_grad():
        pass_ = NormFusion()
        fused, targets = compiled(decoder, pass_)
        for tokens in (6, 3):
            given = inputs(tokens)
            for found, expected in zip(fused(*given), decoder(*given), strict=True):
                assert torch.equal(found, expected), "the reference norms before it quantizes: the same bits"
        assert pass_.matched == 3
    ours = [target.removesuffix(".default") for target in targets if "morphoquant" in target or "vllm_ir" in target]
    assert ours == [
        "morphoquant.rms_norm_linear",
        "morphoquant.add_rms_norm_linear",
        "morphoquant.add_rms_norm_linear",
        "vllm_ir.fused_add_rms_norm",
    ]


def others(handle: Tensor) -> dict[str, Callable]:
    def linear(x: Tensor, modality: Tensor) -> Tensor:
        return ops.bound_linear(x, modality, handle, None)

    def read_twice(x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor) -> Tensor:
        y = norm(x, weight)
        return linear(y, modality) + y

    def two_linears(x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor) -> Tensor:
        y, _ = add_norm(x, residual, weight)
        return linear(y, modality) + linear(y, modality.flip(0))

    def sum_read_before(x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor) -> Tensor:
        y, total = add_norm(x, residual, weight)
        rows = (modality + total[0, 0].int() * 0).int()
        return linear(y, rows)

    return {
        "read by another, too": read_twice,
        "read by two linears": two_linears,
        "a sum that the linear waits for": sum_read_before,
        "Gemma's weight": lambda x, residual, weight, modality: linear(norm(x, weight.float() + 1), modality),
        "no weight": lambda x, residual, weight, modality: linear(norm(x, None), modality),
        "some channels": lambda x, residual, weight, modality: linear(
            torch.ops.vllm_ir.rms_norm(x, weight, EPSILON, K // 2), modality
        ),
        "a head's channels": lambda x, residual, weight, modality: linear(
            norm(x.view(-1, 2, K // 2), weight[: K // 2]).view(-1, K), modality
        ),
        "something between": lambda x, residual, weight, modality: linear(norm(x, weight) * 2, modality),
        "no norm": lambda x, residual, weight, modality: linear(x + residual, modality),
    }


CASES = [
    *("read by another, too", "read by two linears", "a sum that the linear waits for", "Gemma's weight"),
    *("no weight", "some channels", "a head's channels", "something between", "no norm"),
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_that_pattern_stays(handle: Tensor, case: str) -> None:
    function = others(handle)[case]
    with torch.no_grad():
        pass_ = NormFusion()
        same, targets = compiled(function, pass_)
        given = inputs(5)
        assert torch.equal(same(*given), function(*given))
    assert pass_.matched == 0
    assert "morphoquant.bound_linear.default" in targets


@pytest.mark.parametrize("custom_ops", ["none", "+rms_norm"])
def test_vllm_s_norm_is_the_same_operator_with_custom_ops_on_and_off(handle: Tensor, custom_ops: str) -> None:
    """As GPUs run it. (`maybe_inplace` becomes the functional operator in a pass of vLLM's own, before all others.)"""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=[custom_ops]))):
        module = RMSNorm(K, EPSILON, dtype=torch.bfloat16)
        assert module.enabled() == (custom_ops == "+rms_norm")

    def layer(x: Tensor, residual: Tensor, weight: Tensor, modality: Tensor) -> Tensor:
        return ops.bound_linear(module.forward_cuda(x), modality, handle, None)

    with torch.no_grad():
        pass_ = NormFusion()
        fused, _ = compiled(layer, pass_)
        given = inputs(4)
        assert torch.equal(fused(*given), layer(*given))
    assert pass_.matched == 1
