"""vLLM's kernels beside ours, built through the interface of its quantization methods.

Each builder makes one layer of random weights. It returns a call on x, or vLLM's words why the kernel does not run.
The 8-bit and 4-bit activations are quantized within the call, as in a server.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
# A call, or the reason why the layer cannot run here.
Built = Call | str
# Takes N, K and G.
Builder = Callable[[int, int, int], Built]

_KERNELS = "vllm.model_executor.kernels.linear"
# A group as long as K: one scale per output channel.
_PER_CHANNEL = -1
_GPU = torch.device("cuda")

# Dynamic, symmetric, per token: compressed-tensors W4A4 as Humming runs it.
HUMMING_INT4_INPUT = {
    "num_bits": 4,
    "type": "int",
    "strategy": "token",
    "symmetric": True,
    "dynamic": True,
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
}


def mixed_precision(
    module: str,
    name: str,
    activation: torch.dtype,
    *,
    weight_type: str = "uint4b8",
    per_channel: bool = False,
    input_quant: dict[str, Any] | None = None,
    device: torch.device = _GPU,
) -> Builder:
    """A builder for one of vLLM's mixed-precision kernels: symmetric int4 with one bfloat16 scale per group."""

    def build(out_features: int, in_features: int, group_size: int) -> Built:
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
        from vllm.scalar_type import scalar_types

        kernel_class = getattr(import_module(f"{_KERNELS}.mixed_precision.{module}"), name)
        config = MPLinearLayerConfig(
            full_weight_shape=(in_features, out_features),
            partition_weight_shape=(in_features, out_features),
            weight_type=getattr(scalar_types, weight_type),
            act_type=activation,
            group_size=_PER_CHANNEL if per_channel else group_size,
            zero_points=False,
            out_type=torch.bfloat16,
        )
        possible, reason = kernel_class.can_implement(config)
        if not possible:
            return str(reason)
        layer = _packed_layer(out_features, in_features, in_features if per_channel else group_size, device)
        if input_quant is not None:
            layer._humming_input_quant_config = input_quant | {"group_size": 0}
        kernel = kernel_class(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale")
        kernel.process_weights_after_loading(layer)
        return lambda x: kernel.apply_weights(layer, x)

    return build


def _packed_layer(out_features: int, in_features: int, group_size: int, device: torch.device) -> Any:
    """A layer with weights as compressed-tensors packs them: eight of an output in an int32."""
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    layer = torch.nn.Module()
    layer.weight_packed = PackedvLLMParameter(
        data=torch.randint(2**31 - 1, (out_features, in_features // 8), dtype=torch.int32, device=device),
        input_dim=1,
        output_dim=0,
        packed_dim=1,
        packed_factor=8,
        weight_loader=_nothing_is_loaded,
    )
    layer.weight_scale = GroupQuantScaleParameter(
        data=torch.full((out_features, in_features // group_size), 0.01, dtype=torch.bfloat16, device=device),
        input_dim=1,
        output_dim=0,
        weight_loader=_nothing_is_loaded,
    )
    return layer


def _nothing_is_loaded(*_: object, **__: object) -> None:
    """The loader of random weights."""


def int8_by_int8(device: torch.device = _GPU) -> Builder:
    """A builder for CUTLASS' W8A8: int8 weights per channel, int8 activations per token. G has no meaning."""

    def build(out_features: int, in_features: int, group_size: int) -> Built:
        scaled_mm = import_module(f"{_KERNELS}.scaled_mm.ScaledMMLinearKernel")
        kernel_class = import_module(f"{_KERNELS}.scaled_mm.cutlass").CutlassInt8ScaledMMLinearKernel
        config = scaled_mm.Int8ScaledMMLinearLayerConfig(
            is_static_input_scheme=False, is_channelwise=True, input_symmetric=True
        )
        for possible, reason in (kernel_class.is_supported(), kernel_class.can_implement(config)):
            if not possible:
                return str(reason)
        layer = torch.nn.Module()
        layer.logical_widths = [out_features]  # type: ignore[assignment]
        weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=device)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(torch.full((out_features, 1), 0.01, device=device), requires_grad=False)
        names = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
        for name in names[2:]:
            layer.register_parameter(name, None)
        kernel = kernel_class(config, names)
        kernel.process_weights_after_loading(layer)
        return lambda x: kernel.apply_weights(layer, x)

    return build


# Names in tables; the glossary explains them.
PEERS: dict[str, Builder] = {
    "marlin-w4a16": mixed_precision("marlin", "MarlinLinearKernel", torch.bfloat16),
    "marlin-w4a8": mixed_precision("marlin", "MarlinLinearKernel", torch.int8),
    "machete-w4a16": mixed_precision("machete", "MacheteLinearKernel", torch.bfloat16),
    "cutlass-w4a8-fp8": mixed_precision("cutlass", "CutlassW4A8LinearKernel", torch.float8_e4m3fn, weight_type="int4"),
    "cutlass-w8a8": int8_by_int8(),
    "humming-w4a8": mixed_precision("humming", "HummingLinearKernel", torch.int8),
    "humming-w4a8-channel": mixed_precision("humming", "HummingLinearKernel", torch.int8, per_channel=True),
    "humming-w4a4": mixed_precision("humming", "HummingLinearKernel", torch.bfloat16, input_quant=HUMMING_INT4_INPUT),
}
