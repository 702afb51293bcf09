"""A row-parallel layer on several ranks: what each rank computes, and refusals."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from morphoquant_vllm.numerics.linear import matmul
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.checkpoints import random_group
from tests.morphoquant_vllm.plugin.linear_cases import K, N, eight_bit, held, reference, specification, two_level
from tests.records import activation_of, rank_part, weight_of


@pytest.mark.usefixtures("engine_context")
class TestRowParallelLayer:
    """A rank's cut and the sum over ranks, without the processes: layers that believe to be one of several ranks."""

    @staticmethod
    def tensors(blocks: int, scheme: str = "group") -> tuple[QuantizationSpec, dict[str, Tensor]]:
        changed = {"two_level": two_level, "eight_bit": eight_bit}.get(scheme)
        layers = (specification() if changed is None else changed(specification())).layers
        spec = QuantizationSpec(layers=layers, tensor_parallel=blocks)
        full = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
        return spec, random_group([full], spec.layers["mlp.down_proj"], spec, torch.tensor(4))[0]

    @staticmethod
    def rank_layer(
        monkeypatch: pytest.MonkeyPatch, spec: QuantizationSpec, tensors: dict[str, Tensor], rank: int, ranks: int
    ) -> torch.nn.Module:
        from vllm.model_executor.layers import linear as vllm_linear

        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
        layer = vllm_linear.RowParallelLinear(
            K, N, bias=False, reduce_results=False, quant_config=MorphoQuantConfig(spec), prefix="mlp.down_proj"
        )
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    # A checkpoint for two ranks serves one, too: the one rank then holds both blocks.
    @pytest.mark.parametrize("scheme", ["group", "two_level", "eight_bit"])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_each_rank_computes_its_own_formula(self, monkeypatch: pytest.MonkeyPatch, ranks: int, scheme: str) -> None:
        spec, tensors = self.tensors(2, scheme)
        x = torch.randn(40, K, generator=torch.Generator().manual_seed(6)) * 2
        massive = []
        for rank, part in enumerate(x.chunk(ranks, 1)):
            layer = self.rank_layer(monkeypatch, spec, tensors, rank, ranks)
            own = rank_part(tensors, rank, ranks)
            massive.append(held(part, own))
            expected = reference([own], part.contiguous(), spec.any_row)
            assert torch.equal(layer.quant_method.apply(layer, part.contiguous()), expected)
        assert bool(massive[0].any()) and not bool(massive[0].all())
        assert ranks == 1 or bool((massive[0] != massive[1]).any())

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("built", ["ReplicatedLinear", "ColumnParallelLinear"])
    def test_a_layer_that_vllm_gives_the_whole_input_computes_all_blocks(
        self, monkeypatch: pytest.MonkeyPatch, built: str, ranks: int
    ) -> None:
        """vLLM's Transformers backend replicates the linears of models without a tensor-parallel plan."""
        from vllm.model_executor.layers import linear as vllm_linear

        spec, tensors = self.tensors(2)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)
        x = torch.randn(40, K, generator=torch.Generator().manual_seed(6)) * 2
        parts = []
        for rank in range(ranks if built == "ColumnParallelLinear" else 1):
            monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            layer = getattr(vllm_linear, built)(
                K, N, bias=False, quant_config=MorphoQuantConfig(spec), prefix="mlp.down_proj"
            )
            for name, tensor in tensors.items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor)
            layer.quant_method.process_weights_after_loading(layer)
            parts.append(layer.quant_method.apply(layer, x))
        assert bool(held(x, tensors).any())
        assert torch.equal(torch.cat(parts, 1), reference([tensors], x, spec.any_row))

    def test_a_layer_whose_input_vllm_cuts_must_be_row_parallel(self) -> None:
        from vllm.model_executor.layers.linear import RowParallelLinear

        with pytest.raises(MorphoQuantError, match=r"mlp.up_proj: the checkpoint has parallel 'column', but vLLM spl"):
            RowParallelLinear(K, N, bias=False, quant_config=MorphoQuantConfig(specification()), prefix="mlp.up_proj")

    def test_ranks_sum_to_the_whole_layer_where_no_token_is_massive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec, tensors = self.tensors(blocks=2)
        x = torch.randn(40, K, generator=torch.Generator().manual_seed(6)) * 2
        x = x[~held(x, tensors)]
        assert x.shape[0] > 10
        activation, weight = activation_of(tensors), weight_of(tensors)
        rows = token_rows(x, torch.full(x.shape[:1], spec.any_row, dtype=torch.int32), activation)
        whole = matmul(act_quant(x, rows, activation), rows, weight, activation.gain, None)
        total = torch.zeros_like(whole)
        for rank, part in enumerate(x.chunk(2, 1)):
            layer = self.rank_layer(monkeypatch, spec, tensors, rank, 2)
            total += layer.quant_method.apply(layer, part.contiguous()).double()
        # Each rank's output and each constant was cast to float32 once, at sizes below 1000.
        assert float((total - whole).abs().max()) <= 3 * 1000 * 2.0**-24
        assert float(whole.abs().max()) < 500

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_massive_channel_outside_its_block_is_refused(self, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
        spec, tensors = self.tensors(blocks=2)
        tensors["massive_channel"] = tensors["massive_channel"].flip(0)
        with pytest.raises(MorphoQuantError, match=r"mlp.down_proj.massive_channel: a channel lies outside its block"):
            self.rank_layer(monkeypatch, spec, tensors, 0, ranks)
