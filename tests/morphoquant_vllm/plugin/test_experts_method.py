"""Loading into vLLM's own routed experts, one process: outputs, checks, refusals."""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, ExpertsSpec, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import act_quant, escapes, token_rows
from morphoquant_vllm.numerics.experts import experts
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.experts import Expert, random_experts, random_routing, random_tokens, record_of

COUNT, TOP, TOKENS, K, WIDE = 4, 2, 9, 64, 128
NAME = "model.layers.0.mlp.experts"
SHARDS = ("w1", "w3", "w2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def specification(two_level: bool = True, **changes: Any) -> QuantizationSpec:
    settings = ExpertsSpec(COUNT, K, WIDE, 32, "two_level" if two_level else "group")
    return QuantizationSpec(layers={}, tensor_parallel=2, experts={NAME: replace(settings, **changes)})


def made(two_level: bool = True) -> list[Expert]:
    return random_experts(COUNT, K, WIDE, two_level=two_level, blocks=2)


def runner(spec: QuantizationSpec, **settings: Any) -> torch.nn.Module:
    """vLLM's mixture of experts, its router included."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    # vLLM refuses a second layer of one name.
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    arguments = {"num_experts": COUNT, "top_k": TOP, "hidden_size": K, "intermediate_size": WIDE}
    return FusedMoEFactory(**{**arguments, "quant_config": MorphoQuantConfig(spec), "prefix": NAME, **settings})


def files(stored: list[Expert]) -> dict[str, Tensor]:
    """Tensors as a checkpoint holds them, by their names below the list."""
    named = {}
    for index, expert in enumerate(stored):
        for projection, tensors in zip(PROJECTIONS, expert, strict=True):
            for tensor, value in tensors.items():
                if projection == "down_proj" or tensor not in INPUT_TENSORS or (index, projection) == (0, "gate_proj"):
                    named[f"{index}.{projection}.{tensor}"] = value
    return named


def is_input(name: str) -> bool:
    """Whether a tensor is one of the input of gate and up."""
    return name.startswith("0.gate_proj.") and name.rpartition(".")[2] in INPUT_TENSORS


def loaded(spec: QuantizationSpec, tensors: dict[str, Tensor]) -> torch.nn.Module:
    moe = runner(spec)
    reported = list(moe.load_weights(tensors.items()))
    assert len(reported) == len(tensors)
    moe.routed_experts.quant_method.process_weights_after_loading(moe.routed_experts)
    return moe.routed_experts


def call(layer: torch.nn.Module, x: Tensor, ids: torch.dtype = torch.int32) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    topk_weights, topk_ids = random_routing(x.shape[0], TOP, COUNT)
    routing = topk_weights, topk_ids.to(ids)
    return layer.quant_method.apply(layer, x, *routing, None, None), routing


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "select_backend", lambda device: "reference")


@pytest.mark.usefixtures("engine_context")
class TestLoaded:
    @pytest.mark.parametrize("two_level", [False, True])
    def test_loaded_experts_compute_the_reference(self, two_level: bool) -> None:
        stored, spec = made(two_level), specification(two_level)
        layer = loaded(spec, files(stored))
        x, _ = random_tokens(TOKENS)
        rows = torch.arange(TOKENS, dtype=torch.int32) % 5
        layer.modality[:TOKENS] = rows
        for ids in (torch.int32, torch.int64):
            y, routing = call(layer, x, ids)
            assert torch.equal(y, experts(x, rows, *routing, record_of(stored)))
        layer.modality.fill_(spec.any_row)
        assert not list(layer.named_parameters()), "the canonical parameters are gone"

    def test_vllms_loader_gets_no_tensor_that_it_takes_for_all_experts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """vLLM 0.30 takes any of three dimensions for those of all experts in one."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        original, dimensions = RoutedExperts.load_weights, set()

        def load_weights(layer: RoutedExperts, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
            kept = list(weights)
            dimensions.update(tensor.dim() for _, tensor in kept)
            return original(layer, kept)

        monkeypatch.setattr(RoutedExperts, "load_weights", load_weights)
        loaded(specification(), files(made()))
        assert max(dimensions) == 2

    def test_dummy_weights_are_served_and_weights_are_not_loaded_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.config import get_current_vllm_config

        monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
        layer = runner(specification()).routed_experts
        layer.quant_method.process_weights_after_loading(layer)
        x, _ = random_tokens(TOKENS)
        y, _ = call(layer, x)
        assert y.shape == x.shape and bool(y.isfinite().all())
        with pytest.raises(MorphoQuantError, match="not loaded again into a running engine; start a new server"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_dummy_weights_are_served_on_a_later_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.config import get_current_vllm_config

        monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
        parallel(monkeypatch, tp_size=2, tp_rank=1)
        layer = runner(specification()).routed_experts
        layer.quant_method.process_weights_after_loading(layer)
        x, _ = random_tokens(TOKENS)
        assert bool(call(layer, x)[0].isfinite().all())

    def test_a_step_longer_than_the_buffer_takes_any(self) -> None:
        stored, spec = made(), specification()
        layer = loaded(spec, files(stored))
        layer.modality.zero_()
        x, _ = random_tokens(layer.modality.numel() + 1)
        y, routing = call(layer, x)
        rows = torch.full(x.shape[:1], spec.any_row, dtype=torch.int32)
        layer.modality.fill_(spec.any_row)
        assert torch.equal(y, experts(x, rows, *routing, record_of(stored)))

    def test_the_whole_mixture_routes_and_computes(self) -> None:
        """Through vLLM's runner and router."""
        from vllm.config import get_current_vllm_config
        from vllm.forward_context import set_forward_context

        stored, spec = made(), specification()
        moe = runner(spec, renormalize=True)
        list(moe.load_weights(files(stored).items()))
        moe.routed_experts.quant_method.process_weights_after_loading(moe.routed_experts)
        x, _ = random_tokens(TOKENS)
        logits = torch.randn(TOKENS, COUNT, generator=torch.Generator().manual_seed(5))
        with set_forward_context(None, get_current_vllm_config()):
            y = moe(hidden_states=x, router_logits=logits)
        weights, ids = logits.softmax(-1).topk(TOP)
        rows = torch.full((TOKENS,), spec.any_row, dtype=torch.int32)
        expected = experts(x, rows, weights / weights.sum(-1, keepdim=True), ids, record_of(stored))
        # The router's weights may differ in their last bit.
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)


def parallel(monkeypatch: pytest.MonkeyPatch, **settings: int) -> None:
    """Let vLLM's mixture believe that it is one of several ranks."""
    from vllm.model_executor.layers.fused_moe import layer

    real = layer.make_parallel_config

    def make(**arguments: Any) -> Any:
        return replace(real(**arguments), **settings)

    monkeypatch.setattr(layer, "make_parallel_config", make)


@pytest.mark.usefixtures("engine_context")
class TestRanks:
    def test_expert_parallel_ranks_sum_to_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stored, spec = made(), specification()
        x, _ = random_tokens(TOKENS)
        total = torch.zeros_like(x)
        for rank in range(2):
            parallel(monkeypatch, ep_size=2, ep_rank=rank, use_ep=True)
            moe = runner(spec)
            tensors = files(stored)
            reported = list(moe.load_weights(tensors.items()))
            # Its own experts, and the one input, which the first expert holds.
            own = [name for name in tensors if int(name[0]) // 2 == rank or is_input(name)]
            assert len(reported) == len(own)
            layer = moe.routed_experts
            layer.quant_method.process_weights_after_loading(layer)
            assert layer.experts_handle.shape[0] == 2
            y, routing = call(layer, x)
            total += y
            monkeypatch.undo()
            monkeypatch.setattr(backends, "select_backend", lambda device: "reference")
        rows = torch.full((TOKENS,), spec.any_row, dtype=torch.int32)
        # Two roundings to float32 and their sum, for one.
        assert torch.allclose(total, experts(x, rows, *routing, record_of(stored)), rtol=1e-5, atol=1e-6)

    def test_tensor_parallel_ranks_sum_to_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stored, spec = made(), specification()
        for _, _, down in stored:
            # A rank decides by its own values which tokens are massive; then the sum is not the layer's.
            down["massive_high"] = down["massive_low"] - 1
        x, _ = random_tokens(TOKENS)
        total = torch.zeros_like(x)
        for rank in range(2):
            parallel(monkeypatch, tp_size=2, tp_rank=rank)
            layer = loaded(spec, files(stored))
            y, routing = call(layer, x)
            total += y
            monkeypatch.undo()
            monkeypatch.setattr(backends, "select_backend", lambda device: "reference")
        rows = torch.full((TOKENS,), spec.any_row, dtype=torch.int32)
        assert torch.allclose(total, experts(x, rows, *routing, record_of(stored)), rtol=1e-4, atol=1e-5)

    def test_ranks_that_the_checkpoint_was_not_made_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parallel(monkeypatch, tp_size=4)
        with pytest.raises(MorphoQuantError, match=rf"{NAME}.0.down_proj: .*made for sizes \[1, 2\]; serve"):
            runner(specification())


@pytest.mark.usefixtures("engine_context")
class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["0.gate_proj.gain", "2.up_proj.weight_codes", "3.down_proj.centre", "1.down_proj.absorbed_bias"]
    )
    def test_a_tensor_that_was_not_loaded_is_named(self, name: str) -> None:
        tensors = files(made())
        del tensors[name]
        with pytest.raises(MorphoQuantError, match=f"^{NAME}.{name}: was not loaded .*the checkpoint is incomplete"):
            loaded(specification(), tensors)

    def test_an_expert_that_does_not_exist_leaves_another_missing(self) -> None:
        tensors = {name.replace("3.", "7.", 1) if name[0] == "3" else name: t for name, t in files(made()).items()}
        moe = runner(specification())
        list(moe.load_weights(tensors.items()))
        with pytest.raises(MorphoQuantError, match=f"{NAME}.3.gate_proj.weight_codes: was not loaded"):
            moe.routed_experts.quant_method.process_weights_after_loading(moe.routed_experts)

    def test_a_second_input_is_refused(self) -> None:
        tensors = files(made())
        tensors["1.up_proj.gain"] = tensors["0.gate_proj.gain"]
        with pytest.raises(MorphoQuantError, match=f"{NAME}.1.up_proj.gain: exists, but the experts of a layer share"):
            loaded(specification(), tensors)

    def test_another_shape_is_refused(self) -> None:
        tensors = files(made())
        tensors["1.up_proj.weight_codes"] = tensors["1.up_proj.weight_codes"][1:]
        with pytest.raises(MorphoQuantError, match=rf"{NAME}.1.up_proj.weight_codes: has shape \[127, 32\]"):
            loaded(specification(), tensors)

    def test_illegal_values_are_named(self) -> None:
        tensors = files(made())
        tensors["2.up_proj.weight_level"] = tensors["2.up_proj.weight_level"] * 0
        with pytest.raises(MorphoQuantError, match=f"{NAME}.2.up_proj.weight_level: every level must be"):
            loaded(specification(), tensors)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"activation": "gelu"}, "activation 'gelu' cannot be served with quantized experts; leave these"),
            ({"has_bias": True}, "biases of experts cannot be served"),
            ({"swiglu_limit": 7.0}, "a clamped or scaled SwiGLU cannot be served"),
            ({"apply_router_weight_on_input": True}, "router weights on the input of experts cannot be served"),
            ({"num_experts": 8}, "the model has experts 8, the checkpoint 4"),
            ({"hidden_size": 128}, "the model has hidden_size 128, the checkpoint 64"),
            ({"intermediate_size": 64}, "the model has moe_intermediate_size 64, the checkpoint 128"),
        ],
    )
    def test_other_experts_are_refused_by_name(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(MorphoQuantError, match=f"^{NAME}: {message}"):
            runner(specification(), **settings)

    @pytest.mark.parametrize(
        ("settings", "flag"),
        [
            ({"enable_eplb": True}, "--enable-eplb"),
            ({"dp_size": 2}, "--data-parallel-size above 1"),
            ({"pcp_size": 2}, "--prefill-context-parallel-size above 1"),
        ],
    )
    def test_ways_to_serve_that_do_not_fit(
        self, settings: dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parallel(monkeypatch, **settings)
        with pytest.raises(MorphoQuantError, match=f"^{NAME}: quantized experts are not served with {flag}"):
            runner(specification())

    def test_lora_is_refused(self) -> None:
        from morphoquant_vllm.plugin.experts_method import refuse_unserved

        layer = runner(specification()).routed_experts
        layer.moe_config.is_lora_enabled = True
        with pytest.raises(MorphoQuantError, match="not served with --enable-lora"):
            refuse_unserved(NAME, layer, specification().experts[NAME])

    def test_a_backend_without_experts_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "select_backend", lambda device: "none")
        monkeypatch.setitem(backends.BACKENDS, "none", replace(backends.BACKENDS["reference"], experts=None))
        with pytest.raises(MorphoQuantError, match=f"{NAME}: the backend 'none' does not serve quantized experts"):
            loaded(specification(), files(made()))

    def test_a_router_is_not_quantized(self) -> None:
        from vllm.model_executor.layers.fused_moe import GateLinear

        layers = {"mlp.gate": LayerSpec(64, 4, 32, "column", "mlp.gate")}
        config = MorphoQuantConfig(QuantizationSpec(layers=layers))
        with pytest.raises(MorphoQuantError, match=r"mlp.gate: the router of experts is served in 16 bit only"):
            GateLinear(64, 4, quant_config=config, prefix="mlp.gate")


@pytest.mark.usefixtures("engine_context")
class TestSixteenBit:
    OTHER = QuantizationSpec(layers={"q_proj": LayerSpec(64, 64, 32, "column", "q_proj")})

    def test_experts_that_the_checkpoint_does_not_name_stay_with_vllm(self) -> None:
        layer = runner(self.OTHER).routed_experts
        assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"

    def test_but_not_under_expert_parallelism_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parallel(monkeypatch, ep_size=2, use_ep=True)
        with pytest.raises(MorphoQuantError, match=f"{NAME}: vLLM's CPU kernel for 16-bit experts does not know"):
            runner(self.OTHER)


def test_lists_of_experts_get_the_names_of_the_model_class() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = MorphoQuantConfig(specification())
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert list(config.experts) == [f"language_model.{NAME}"]
    assert SimpleNamespace(**vars(config.experts[f"language_model.{NAME}"])).count == COUNT


@pytest.mark.usefixtures("engine_context")
def test_the_escapes_of_the_one_input_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    monkeypatch.setattr(WorkerWrapperBase, "execute_model", WorkerWrapperBase.execute_model)
    settings = {"morphoquant": {"watch_escapes": {"every": 1, "seconds": 60}}}
    stored = made()
    x, modality = random_tokens(TOKENS, K)
    x = x * 4
    with set_current_vllm_config(VllmConfig(additional_config=settings)):
        layer = loaded(specification(), files(stored))
        watch = layer.quant_method.watch
        layer.modality[:TOKENS] = modality
        plain = call(layer, x)[0]
        assert not watch.row_counts()
        with watch.step(TOKENS - 2):
            assert torch.equal(call(layer, x)[0], plain)
    record = record_of(stored).input
    escaped = escapes(act_quant(x, token_rows(x, modality, record), record)).sum(1)[:-2]
    found = watch.row_counts()
    assert {name: row.escapes for name, row in found.items() if name != "massive"} == {
        watch.rows[row]: int(escaped[modality[:-2] == row].sum()) for row in modality[:-2].unique().tolist()
    }
    assert sum(row.codes for name, row in found.items() if name != "massive") == K * (TOKENS - 2)
    assert int(escaped.sum()) > 0
