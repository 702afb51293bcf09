"""Checkpoints of some linears, vLLM's own layers that load them, and the reference's outputs."""

from dataclasses import replace

import torch
from torch import Tensor

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import is_massive
from morphoquant_vllm.numerics.linear import linear
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N, G = 64, 32, 32
SHARDS = ("gate_proj", "up_proj")


def specification(bias: bool = False) -> QuantizationSpec:
    layers = {f"mlp.{shard}": LayerSpec(K, N, G, "column", "mlp.gate_up_proj", bias) for shard in SHARDS}
    layers["mlp.down_proj"] = LayerSpec(K, N, G, "row", "mlp.down_proj")
    return QuantizationSpec(layers=layers)


def two_level(spec: QuantizationSpec) -> QuantizationSpec:
    layers = {name: replace(layer, scale_scheme="two_level") for name, layer in spec.layers.items()}
    return QuantizationSpec(layers=layers)


def eight_bit(spec: QuantizationSpec) -> QuantizationSpec:
    layers = {name: replace(layer, weight_bits=8) for name, layer in spec.layers.items()}
    return QuantizationSpec(layers=layers)


def stored(spec: QuantizationSpec, count: int) -> list[dict[str, Tensor]]:
    matrices = list(torch.randn(count, N, K, generator=torch.Generator().manual_seed(7)))
    return random_group(matrices, spec.layers["mlp.gate_proj"], spec, torch.tensor(3))


def merged_layer(spec: QuantizationSpec, bias: bool = False) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    config = MorphoQuantConfig(spec)
    config.packed_modules_mapping = {"gate_up_proj": list(SHARDS)}
    return MergedColumnParallelLinear(K, [N, N], bias=bias, quant_config=config, prefix="mlp.gate_up_proj")


def load(layer: torch.nn.Module, shards: list[dict[str, Tensor]]) -> torch.nn.Module:
    for index, tensors in enumerate(shards):
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, index)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def reference(shards: list[dict[str, Tensor]], x: Tensor, row: int) -> Tensor:
    modality = torch.full((x.shape[0],), row, dtype=torch.int32)
    return linear(x, modality, weight_of(*shards), activation_of(shards[0]))


def stay_any(layer: torch.nn.Module, spec: QuantizationSpec) -> bool:
    """Whether the buffer of rows, which no embedding fills here, holds 'any' alone."""
    return layer.modality.unique().tolist() == [spec.any_row]


def held(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return is_massive(x, tensors["massive_channel"], tensors["massive_low"], tensors["massive_high"])
