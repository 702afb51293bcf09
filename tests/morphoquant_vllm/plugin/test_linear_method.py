"""Loading into vLLM's own linear layers, one process: checks, refusals and outputs."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.gpu import device
from morphoquant_vllm.numerics.linear import linear
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.checkpoints import random_group
from tests.morphoquant_vllm.plugin.linear_cases import (
    SHARDS,
    G,
    K,
    N,
    eight_bit,
    held,
    load,
    merged_layer,
    reference,
    specification,
    stay_any,
    stored,
    two_level,
)
from tests.records import activation_of, weight_of


@pytest.mark.usefixtures("engine_context")
class TestFusedLayer:
    def test_a_loaded_layer_computes_the_reference(self) -> None:
        spec = specification()
        shards = stored(spec, 2)
        layer = load(merged_layer(spec), shards)
        x = torch.randn(20, K, generator=torch.Generator().manual_seed(1)) * 2
        assert 0 < int(held(x, shards[0]).sum()) < 20
        y, _ = layer(x)
        assert stay_any(layer, spec)
        assert torch.equal(y, reference(shards, x, spec.any_row))
        nested, _ = layer(x.view(1, 20, K))
        assert torch.equal(nested[0], y)
        assert not list(layer.named_parameters()), "the canonical parameters are gone, no second copy stays"

    def test_dummy_weights_make_a_valid_layer_without_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.config import get_current_vllm_config

        monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
        for spec in (specification(), two_level(specification()), eight_bit(specification())):
            layer = merged_layer(spec)
            layer.quant_method.process_weights_after_loading(layer)
            y, _ = layer(torch.randn(5, K, generator=torch.Generator().manual_seed(1)))
            assert bool(y.isfinite().all()) and float(y.std()) > 0

    def test_only_for_adapters_a_layer_has_a_weight_that_tells_its_device(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm.config import get_current_vllm_config
        from vllm.lora.layers.utils import _get_lora_device

        spec = specification()
        plain = load(merged_layer(spec), stored(spec, 2))
        monkeypatch.setattr(get_current_vllm_config(), "lora_config", SimpleNamespace())
        adapted = load(merged_layer(spec), stored(spec, 2))
        assert not hasattr(plain, "weight")
        assert _get_lora_device(adapted) == adapted.weight.device == torch.device("cpu")
        assert adapted.state_dict().keys() == plain.state_dict().keys()
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
        assert torch.equal(adapted(x)[0], plain(x)[0])

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_tensor_of_several_shards_is_loaded_under_a_tuple_of_ids(
        self, monkeypatch: pytest.MonkeyPatch, ranks: int
    ) -> None:
        """Qwen3.5's in_proj_qkv is three shards of vLLM's in_proj_qkvz, and in_proj_z the fourth.

        Each rank has its part of each of the four.
        """
        from vllm.model_executor.layers import linear as vllm_linear

        names = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
        sizes = (2 * N, N)
        fused = "linear_attn.in_proj_qkvz"
        spec = QuantizationSpec(
            layers={name: LayerSpec(K, n, G, "column", fused) for name, n in zip(names, sizes, strict=True)}
        )
        matrices = [torch.randn(n, K, generator=torch.Generator().manual_seed(n)) for n in sizes]
        shards = random_group(matrices, spec.layers[names[0]], spec, torch.tensor(3))
        config = MorphoQuantConfig(spec)
        config.packed_modules_mapping = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
        vllm_sizes = [N // 2, N // 2, N, N]
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)

        def built(parts: Iterable[tuple[dict[str, Tensor], tuple[int, ...] | int]], rank: int = 0) -> torch.nn.Module:
            monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
            layer = vllm_linear.MergedColumnParallelLinear(K, vllm_sizes, bias=False, quant_config=config, prefix=fused)
            for tensors, shard_id in parts:
                for name, tensor in tensors.items():
                    parameter = getattr(layer, name)
                    parameter.weight_loader(parameter, tensor, shard_id)
            layer.quant_method.process_weights_after_loading(layer)
            return layer

        x = torch.randn(20, K, generator=torch.Generator().manual_seed(1))
        whole = reference(shards, x, spec.any_row).split(vllm_sizes, 1)
        for rank in range(ranks):
            layer = built(zip(shards, ((0, 1, 2), 3), strict=True), rank)
            assert torch.equal(layer(x)[0], torch.cat([part.chunk(ranks, 1)[rank] for part in whole], 1))
        with pytest.raises(MorphoQuantError, match="1 of 2 shards were loaded"):
            built([(shards[0], (0, 1, 2))])

    def test_each_token_takes_the_row_that_the_buffer_names(self) -> None:
        spec = specification()
        shards = stored(spec, 2)
        layer = load(merged_layer(spec), shards)
        x = torch.randn(20, K, generator=torch.Generator().manual_seed(2))
        rows = torch.arange(20, dtype=torch.int32) % (len(spec.rows) - 1)
        layer.modality[:20] = rows
        y, _ = layer(x)
        assert torch.equal(y, linear(x, rows, weight_of(*shards), activation_of(shards[0])))
        layer.modality.fill_(spec.any_row)
        assert not torch.equal(y, layer(x)[0])

    def test_a_step_longer_than_the_buffer_takes_any(self) -> None:
        spec = specification()
        shards = stored(spec, 2)
        layer = load(merged_layer(spec), shards)
        layer.modality.zero_()
        longer = layer.modality.numel() + 1
        x = torch.randn(longer, K, generator=torch.Generator().manual_seed(3))
        assert torch.equal(layer(x)[0], reference(shards, x, spec.any_row))
        assert torch.equal(layer(x[1:])[0], reference(shards, x[1:], 0))

    def test_a_fixed_row_serves_any_number_of_tokens(self) -> None:
        """Towers get images of more patches than a step has tokens."""
        layers = {name: replace(layer, fixed_row="image") for name, layer in specification().layers.items()}
        spec = QuantizationSpec(layers=layers)
        shards = stored(spec, 2)
        layer = load(merged_layer(spec), shards)
        assert not hasattr(layer, "modality")
        for tokens in (1, 7, 5000):
            x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens))
            assert torch.equal(layer(x)[0], reference(shards, x, spec.rows.index("image")))

    def test_a_two_level_layer_computes_the_reference(self) -> None:
        spec = two_level(specification())
        shards = stored(spec, 2)
        assert not torch.equal(*(shard["weight_channel_scale"] for shard in shards))
        layer = load(merged_layer(spec), shards)
        x = torch.randn(20, K, generator=torch.Generator().manual_seed(1)) * 2
        y, _ = layer(x)
        # One float32 rounding for the sum, one for each factor and for the addition.
        torch.testing.assert_close(y, reference(shards, x, spec.any_row), rtol=2**-20, atol=1e-5)
        assert layer.quant_method.backend == backends.select_backend(x.device)

    def test_an_eight_bit_layer_computes_the_reference(self) -> None:
        spec = eight_bit(specification())
        shards = stored(spec, 2)
        assert shards[0]["weight_codes"].dtype is torch.int8
        layer = load(merged_layer(spec), shards)
        x = torch.randn(20, K, generator=torch.Generator().manual_seed(1)) * 2
        torch.testing.assert_close(layer(x)[0], reference(shards, x, spec.any_row), rtol=2**-20, atol=1e-5)
        assert layer.quant_method.backend == backends.select_backend(x.device)

    def test_two_level_shards_need_their_levels(self) -> None:
        spec = two_level(specification())
        shards = stored(spec, 2)
        del shards[1]["weight_level"]
        with pytest.raises(MorphoQuantError, match=r"weight_level: 1 of 2 shards were loaded"):
            load(merged_layer(spec), shards)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_layer_that_is_fused_in_the_file_is_cut_as_vllm_cuts_it(
        self, monkeypatch: pytest.MonkeyPatch, ranks: int
    ) -> None:
        """attn.qkv of Qwen2.5-VL's tower: each rank has its heads of q, of k and of v."""
        from vllm.model_executor.layers import linear as vllm_linear

        spec = QuantizationSpec(layers={"attn.qkv": LayerSpec(K, 3 * K, G, "column", "attn.qkv", fixed_row="image")})
        full = torch.randn(3 * K, K, generator=torch.Generator().manual_seed(8))
        (tensors,) = random_group([full], spec.layers["attn.qkv"], spec, torch.tensor(9))
        config = MorphoQuantConfig(spec)
        config.packed_modules_mapping = {"qkv": ["qkv"]}
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(10))
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            layer = vllm_linear.QKVParallelLinear(K, K // 4, 4, 4, bias=False, quant_config=config, prefix="attn.qkv")
            for name, tensor in tensors.items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor)
            layer.quant_method.process_weights_after_loading(layer)
            parts.append(layer(x)[0].unflatten(1, (3, -1)))
        expected = reference([tensors], x, spec.rows.index("image"))
        assert torch.equal(torch.cat(parts, 2).flatten(1), expected)

    @pytest.mark.parametrize("tensor", INPUT_TENSORS)
    def test_unequal_shards_are_refused_by_name(self, tensor: str) -> None:
        spec = specification()
        shards = stored(spec, 2)
        changed = shards[1][tensor].clone()
        changed.view(-1)[:2] = changed.view(-1)[:2].flip(0) if tensor == "channel_order" else changed.view(-1)[1:3] + 1
        if changed.dtype is torch.bool:
            changed = ~shards[1][tensor]
        shards[1][tensor] = changed
        with pytest.raises(MorphoQuantError, match=rf"mlp.gate_proj.{tensor}: differs between the shards"):
            load(merged_layer(spec), shards)

    def test_a_tensor_that_was_never_loaded_is_missed(self) -> None:
        spec = specification()
        shards = stored(spec, 2)
        del shards[1]["weight_codes"]
        with pytest.raises(MorphoQuantError, match=r"weight_codes: 1 of 2 shards were loaded"):
            load(merged_layer(spec), shards)

    @pytest.mark.parametrize(
        ("tensor", "value", "message"),
        [
            ("weight_scale", float("nan"), "weight_scale: holds NaN"),
            ("absorbed_bias", float("inf"), "absorbed_bias: holds NaN or infinite"),
            ("weight_scale", 0.0, "weight_scale: every value must be positive"),
            ("weight_level", 17, "weight_level: every level must be 1 to 16"),
        ],
    )
    def test_damaged_values_are_refused(self, tensor: str, value: float, message: str) -> None:
        spec = two_level(specification()) if tensor == "weight_level" else specification()
        shards = stored(spec, 2)
        shards[1][tensor].view(-1)[0] = value
        with pytest.raises(MorphoQuantError, match=message):
            load(merged_layer(spec), shards)

    def test_a_tensor_of_another_shape_is_refused(self) -> None:
        spec = specification()
        shards = stored(spec, 2)
        shards[0]["centre"] = shards[0]["centre"][:, : K // 2]
        with pytest.raises(MorphoQuantError, match=r"centre: has shape \[6, 32\], expected \[6, 64\]"):
            load(merged_layer(spec), shards)

    def test_a_bias_the_checkpoint_does_not_know_is_refused(self) -> None:
        spec = specification(bias=False)
        with pytest.raises(MorphoQuantError, match=r"mlp.gate_proj: the model has a bias, the checkpoint has no bias"):
            load(merged_layer(spec, bias=True), stored(spec, 2))

    def test_a_bias_with_nan_is_refused(self) -> None:
        spec = specification(bias=True)
        layer = merged_layer(spec, bias=True)
        layer.bias.data.fill_(float("nan"))
        with pytest.raises(MorphoQuantError, match=r"mlp.gate_proj.bias: holds NaN"):
            load(layer, stored(spec, 2))

    @pytest.mark.parametrize(
        ("capability", "dtype", "line"),
        [
            ((7, 5), torch.bfloat16, "mlp.gate_proj: GPU 7.5 is not served; serve on a GPU of compute capability"),
            ((9, 0), torch.float32, "mlp.gate_proj: activations in torch.float32 are not served on a GPU; serve with"),
        ],
    )
    def test_what_the_gpu_kernels_do_not_serve_is_refused_at_load(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, line: str
    ) -> None:
        """A layer that believes to be on a GPU; nothing is laid out or compiled for it."""
        monkeypatch.setattr(backends, "select_backend", lambda _: "triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        units = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: units)
        # Not through the cache, which would keep this GPU for other tests.
        monkeypatch.setattr(device, "profile_of", device.profile_of.__wrapped__)
        spec = specification()
        layer = merged_layer(spec)
        layer.quant_method.activation_dtype = dtype
        with pytest.raises(MorphoQuantError) as caught:
            load(layer, stored(spec, 2))
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)

    def test_an_input_size_that_is_not_the_models_is_refused(self) -> None:
        from vllm.model_executor.layers.linear import ReplicatedLinear

        with pytest.raises(MorphoQuantError, match=r"mlp.up_proj: the model has K = 128, the checkpoint 64"):
            ReplicatedLinear(128, N, bias=False, quant_config=MorphoQuantConfig(specification()), prefix="mlp.up_proj")

    def test_outputs_that_are_not_the_models_are_refused(self) -> None:
        """vLLM would load the first of them, and serve another model."""
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

        spec = specification()
        with pytest.raises(
            MorphoQuantError, match=r"mlp.up_proj: the model has N = 16, the checkpoint 32; config.json"
        ):
            ReplicatedLinear(K, 16, bias=False, quant_config=MorphoQuantConfig(spec), prefix="mlp.up_proj")
        config = MorphoQuantConfig(spec)
        config.packed_modules_mapping = {"gate_up_proj": list(SHARDS)}
        with pytest.raises(
            MorphoQuantError, match=r"mlp.up_proj: the model has N = 16, the checkpoint 32; config.json"
        ):
            MergedColumnParallelLinear(K, [N, 16], bias=False, quant_config=config, prefix="mlp.gate_up_proj")

    @pytest.mark.parametrize(
        ("heads", "refused"), [(2, None), (1, "a.k_proj: the model has N = 32, the checkpoint 64")]
    )
    def test_fewer_heads_of_keys_than_in_the_file_are_refused(self, heads: int, refused: str | None) -> None:
        from vllm.model_executor.layers.linear import QKVParallelLinear

        sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
        spec = QuantizationSpec({f"a.{name}": LayerSpec(K, n, G, "column", "a.qkv_proj") for name, n in sizes.items()})
        config = MorphoQuantConfig(spec)
        config.packed_modules_mapping = {"qkv_proj": list(sizes)}
        with pytest.raises(MorphoQuantError, match=refused) if refused else nullcontext():
            QKVParallelLinear(K, 32, 4, heads, bias=False, quant_config=config, prefix="a.qkv_proj")
