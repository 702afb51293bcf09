"""The graph pass of silu(gate) * up: the graphs that it fuses, and those that it leaves alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.nn.functional import gelu, silu

from morphoquant_vllm import backends, ops
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from morphoquant_vllm.plugin.silu_mul_pass import SiluMulFusion
from tests.checkpoints import random_group
from tests.morphoquant_vllm.plugin.linear_cases import load
from tests.records import activation_of, weight_of

K, N, G = 64, 48, 32


@pytest.fixture(scope="module")
def records() -> tuple[list[Tensor], list[Tensor]]:
    layer = LayerSpec(K, N, G, "row", "layer")
    spec = QuantizationSpec(layers={"layer": layer})
    matrix = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    (tensors,) = random_group([matrix], layer, spec, torch.tensor(2))
    return list(weight_of(tensors)), list(activation_of(tensors))


@pytest.fixture(scope="module")
def handle(records: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Of a layer that is bound to the reference, which has no fused kernel."""
    return ops.bind(*records, None, torch.float32, "reference")


def gate_up(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input whose number of tokens alone is dynamic, as in vLLM, and a buffer of rows that is longer."""
    generator = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, 2 * K, generator=generator) * 3).to(dtype)
    torch._dynamo.mark_dynamic(x, 0)
    return x, torch.randint(6, (16,), generator=generator, dtype=torch.int32)


def compiled(function: Callable, pass_: SiluMulFusion) -> tuple[Callable, list[str]]:
    """`function` traced as inductor would and passed through the pass, but not compiled; and the ops of its graph."""
    targets: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: object) -> Callable:
        pass_(module.graph)
        module.recompile()
        targets[:] = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        return module

    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    return torch.compile(function, backend=backend, fullgraph=True), targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_and_mul_become_part_of_the_op(handle: Tensor, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    def layer(x: Tensor, modality: Tensor) -> Tensor:
        return ops.bound_linear(SiluAndMul.forward_native(x), modality, handle, None) + 1

    with torch.no_grad():
        pass_ = SiluMulFusion()
        fused, targets = compiled(layer, pass_)
        for tokens in (6, 3):
            x, modality = gate_up(tokens, dtype)
            assert torch.equal(fused(x, modality), layer(x, modality)), "the reference has no fused kernel: same bits"
        assert pass_.matched == 1
        assert [target for target in targets if "morphoquant" in target] == [
            "morphoquant.bound_silu_mul_linear.default"
        ]
        assert not [target for target in targets if "exp" in target or "sigmoid" in target]


def others(handle: Tensor) -> dict[str, Callable]:
    def linear(x: Tensor, modality: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.bound_linear(x, modality, handle, bias)

    def used_twice(x: Tensor, modality: Tensor) -> Tensor:
        y = silu(x[:, :K]) * x[:, K:]
        return linear(y, modality) + y.sum()

    return {
        "another activation": lambda x, modality: linear(gelu(x[:, :K]) * x[:, K:], modality),
        "gate and up the other way round": lambda x, modality: linear(x[:, :K] * silu(x[:, K:]), modality),
        "halves of other sizes": lambda x, modality: linear(silu(x[:, :K]) * x[:, K - 1 : 2 * K - 1], modality),
        "a second user": used_twice,
        "a bias": lambda x, modality: linear(silu(x[:, :K]) * x[:, K:], modality, x.new_ones(N)),
    }


CASES = ["another activation", "gate and up the other way round", "halves of other sizes", "a second user", "a bias"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_that_pattern_stays(handle: Tensor, case: str) -> None:
    function = others(handle)[case]
    with torch.no_grad():
        pass_ = SiluMulFusion()
        same, targets = compiled(function, pass_)
        x, modality = gate_up(5, torch.float32)
        assert torch.allclose(same(x, modality), function(x, modality), rtol=1e-6)
    assert pass_.matched == 0
    assert "morphoquant.bound_linear.default" in targets


def test_the_op_of_layers_that_are_not_bound_stays(records: tuple[list[Tensor], list[Tensor]]) -> None:
    def layer(x: Tensor, modality: Tensor) -> Tensor:
        return ops.linear(silu(x[:, :K]) * x[:, K:], modality, *records, None, "reference")

    pass_ = SiluMulFusion()
    with torch.no_grad():
        same, targets = compiled(layer, pass_)
        x, modality = gate_up(5, torch.float32)
        same(x, modality)
    assert pass_.matched == 0 and "morphoquant.linear.default" in targets


def test_inductor_runs_the_pass_and_computes_the_same(handle: Tensor) -> None:
    """Through the compiler itself."""

    def layer(x: Tensor, modality: Tensor) -> Tensor:
        return ops.bound_linear(silu(x[:, :K]) * x[:, K:], modality, handle, None)

    pass_ = SiluMulFusion()
    options = {"post_grad_custom_post_pass": pass_}
    # A graph from the cache has been through the pass already.
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        fused = torch.compile(layer, fullgraph=True, options=options)
        x, modality = gate_up(7, torch.bfloat16)
        assert torch.equal(fused(x, modality), layer(x, modality))
    assert pass_.matched == 1


@pytest.mark.usefixtures("engine_context")
def test_vllm_s_own_mlp_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's modules leave no operation in the graph between SiluAndMul and our op."""
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    monkeypatch.setattr(backends, "select_backend", lambda _: "reference")
    hidden, inner = 64, 96
    layers = {f"mlp.{name}_proj": LayerSpec(hidden, inner, G, "column", "mlp.gate_up_proj") for name in ("gate", "up")}
    layers["mlp.down_proj"] = LayerSpec(inner, hidden, G, "row", "mlp.down_proj")
    spec = QuantizationSpec(layers=layers)
    config = MorphoQuantConfig(spec)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    mlp = Qwen2MLP(hidden, inner, "silu", quant_config=config, prefix="mlp")
    generator = torch.Generator().manual_seed(8)
    pairs = list(torch.randn(2, inner, hidden, generator=generator))
    load(mlp.gate_up_proj, random_group(pairs, layers["mlp.gate_proj"], spec, torch.tensor(3)))
    matrix = torch.randn(hidden, inner, generator=generator)
    (down,) = random_group([matrix], layers["mlp.down_proj"], spec, torch.tensor(4))
    for name, tensor in down.items():
        parameter = getattr(mlp.down_proj, name)
        parameter.weight_loader(parameter, tensor)
    mlp.down_proj.quant_method.process_weights_after_loading(mlp.down_proj)
    x = torch.randn(9, hidden, generator=generator).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        fused, targets = compiled(mlp, SiluMulFusion())
        # Not mlp(x): outside of compiled models vLLM compiles SiluAndMul alone, which rounds once.
        middle = mlp.act_fn.forward_native(mlp.gate_up_proj(x)[0])
        assert torch.equal(fused(x), mlp.down_proj(middle)[0])
    assert [target for target in targets if "morphoquant" in target] == [
        "morphoquant.bound_linear.default",
        "morphoquant.bound_silu_mul_linear.default",
    ]
