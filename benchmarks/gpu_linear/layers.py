"""The timed layers: each function builds one layer of random weights and returns a call on x, or the reason why not.

Ours and the 8-bit and 4-bit peers include quantizing their activations, as in a server. The peers are vLLM's kernels,
built through the interface of its quantization methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record

Call = Callable[[Tensor], Tensor]
# A call, or the reason why the layer cannot run here.
Built = Call | str
# Rows of a checkpoint: text, image, video, audio, any, massive.
ROWS = 6


def bfloat16(out_features: int, in_features: int, group_size: int) -> Built:
    """cuBLAS."""
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def _activation(out_features: int, in_features: int) -> ActivationRecord:
    """An activation record in which every channel may escape, with one set of massive intervals.

    Among the measured layers, only down has more inputs than outputs. As in a server, its input comes in channel order.
    """
    device = "cuda"
    order = torch.arange if in_features > out_features else torch.randperm
    return ActivationRecord(
        inverse=torch.full((ROWS, in_features), 3.0, device=device),
        centre=torch.zeros(ROWS, in_features, device=device),
        mask=torch.ones(ROWS, in_features, dtype=torch.bool, device=device),
        gain=torch.ones(ROWS, device=device),
        channel_order=order(in_features, device=device).int(),
        massive_channel=torch.arange(4, device=device).int()[None],
        massive_low=torch.full((1, 4), 1e3, device=device),
        massive_high=torch.full((1, 4), 2e3, device=device),
    )


def _ours(weight: WeightRecord, out_features: int, in_features: int) -> Call:
    """A bound layer: quantizer, product and, if K is split, the reduction."""
    activation = _activation(out_features, in_features)
    backend = backends.BACKENDS["triton"]
    backend.check("benchmark", weight, activation, torch.bfloat16)
    handle = ops.bind(*backend.prepare(weight, activation), None, torch.bfloat16, "triton")
    modality = torch.full((65536,), ROWS - 2, dtype=torch.int32, device="cuda")
    return lambda x: ops.bound_linear(x, modality, handle, None)


def morphoquant(out_features: int, in_features: int, group_size: int) -> Built:
    """Ours with group scales."""
    weight = weight_record(
        torch.randint(256, (out_features, in_features // 2), device="cuda").to(torch.uint8),
        (torch.rand(out_features, in_features // group_size, device="cuda") / 100 + 0.001).bfloat16(),
        torch.zeros(1, ROWS, out_features, device="cuda"),
    )
    return _ours(weight, out_features, in_features)


def morphoquant_two_level(out_features: int, in_features: int, group_size: int) -> Built:
    """Ours with two-level scales."""
    weight = WeightRecord(
        torch.randint(256, (out_features, in_features // 2), device="cuda").to(torch.uint8),
        torch.randint(1, 17, (out_features, in_features // group_size), device="cuda").to(torch.uint8),
        torch.rand(out_features, device="cuda") / 1000 + 0.0001,
        torch.zeros(ROWS, out_features, device="cuda"),
    )
    return _ours(weight, out_features, in_features)


def _vllm_kernel(
    module: str, name: str, activation: torch.dtype, input_quant: dict[str, Any] | None = None
) -> Callable[[int, int, int], Built]:
    """A builder for one of vLLM's mixed-precision kernels, int4 symmetric with one bfloat16 scale per group."""

    def build(out_features: int, in_features: int, group_size: int) -> Built:
        from importlib import import_module

        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
        from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
        from vllm.scalar_type import scalar_types

        kernel_class = getattr(import_module(f"vllm.model_executor.kernels.linear.mixed_precision.{module}"), name)
        config = MPLinearLayerConfig(
            full_weight_shape=(in_features, out_features),
            partition_weight_shape=(in_features, out_features),
            weight_type=scalar_types.uint4b8,
            act_type=activation,
            group_size=group_size,
            zero_points=False,
        )
        possible, reason = kernel_class.can_implement(config)
        if not possible:
            return str(reason)

        def loader(*_: object, **__: object) -> None:
            """Nothing is loaded: the weights are random."""

        layer = torch.nn.Module()
        # As compressed-tensors packs them: eight weights of an output in an int32.
        layer.weight_packed = PackedvLLMParameter(
            data=torch.randint(2**31 - 1, (out_features, in_features // 8), dtype=torch.int32, device="cuda"),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=8,
            weight_loader=loader,
        )
        layer.weight_scale = GroupQuantScaleParameter(
            data=torch.full((out_features, in_features // group_size), 0.01, dtype=torch.bfloat16, device="cuda"),
            input_dim=1,
            output_dim=0,
            weight_loader=loader,
        )
        if input_quant is not None:
            layer._humming_input_quant_config = input_quant | {"group_size": 0}
        kernel = kernel_class(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale")
        kernel.process_weights_after_loading(layer)
        return lambda x: kernel.apply_weights(layer, x)

    return build


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

LAYERS: dict[str, Callable[[int, int, int], Built]] = {
    "bf16": bfloat16,
    "morphoquant": morphoquant,
    "morphoquant-two-level": morphoquant_two_level,
    "marlin-w4a16": _vllm_kernel("marlin", "MarlinLinearKernel", torch.bfloat16),
    "marlin-w4a8": _vllm_kernel("marlin", "MarlinLinearKernel", torch.int8),
    "humming-w4a4": _vllm_kernel("humming", "HummingLinearKernel", torch.bfloat16, HUMMING_INT4_INPUT),
}
