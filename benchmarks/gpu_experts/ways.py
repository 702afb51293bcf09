"""Each way of running one layer's experts on a GPU, as a function of x, the weights and the ids of its experts.

Peers are vLLM's own layers with random weights, made through the interface of its quantization methods. Quantization,
sorting and the weighted sum are within the call, as in a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.routed import ROWS, Layer, generated
from morphoquant_vllm import backends, ops
from morphoquant_vllm.numerics.experts import ExpertsRecord

# Takes x [M, K], topk_weights and topk_ids [M, T].
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# Takes the layer and the group size.
Builder = Callable[[Layer, int], Call]

_PREFIX = "model.layers.0.mlp.experts"
_GPU = torch.device("cuda")
# Most tokens of a call of ours.
MOST_TOKENS = 65536


def ours(two_level: bool, device: torch.device = _GPU) -> Builder:
    """A builder for the kernels as the op calls them; tokens have the row `any`."""

    def build(layer: Layer, group_size: int) -> Call:
        record = _on(generated(layer, group_size, two_level), device)
        prepared = backends.prepare_experts("benchmark", record, torch.bfloat16)
        handle = ops.bind_experts(prepared, record.down.absorbed_bias)
        modality = torch.full((MOST_TOKENS,), ROWS - 2, dtype=torch.int32, device=device)
        return lambda x, weights, ids: ops.bound_experts(x, modality, weights, ids, handle)

    return build


def _on(record: ExpertsRecord, device: torch.device) -> ExpertsRecord:
    return ExpertsRecord(*(type(part)(*(tensor.to(device) for tensor in part)) for part in record))


def int4_config(group_size: int, activation_bits: int | None) -> dict[str, Any]:
    """compressed-tensors' config: symmetric int4 in groups; activations by token, or of 16 bit."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    by_token = {"num_bits": activation_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "dynamic": False},
        "input_activations": None if activation_bits is None else by_token,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def peer(kind: str, backend: str = "auto", device: torch.device = _GPU) -> Builder:
    """A builder for vLLM's experts: `kind` is bf16, w4a16 (compressed-tensors) or humming-w4a8.

    `backend` is that of vLLM's --moe-backend. vLLM's error is raised if it does not serve the layer here.
    """

    def build(layer: Layer, group_size: int) -> Call:
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory

        config = get_current_vllm_config()
        # vLLM refuses a second layer of one name.
        config.compilation_config.static_forward_context.clear()
        config.kernel_config.moe_backend = backend
        with device:
            made = FusedMoEFactory(
                num_experts=layer.experts,
                top_k=layer.chosen,
                hidden_size=layer.hidden,
                intermediate_size=layer.between,
                params_dtype=torch.bfloat16,
                quant_config=_quant_config(kind, group_size),
                prefix=_PREFIX,
            ).routed_experts
            _fill(made)
            method = made.quant_method
            method.process_weights_after_loading(made)
        return lambda x, weights, ids: method.apply(made, x, weights, ids, None, None)

    return build


def _quant_config(kind: str, group_size: int) -> Any:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.humming import HummingConfig

    if kind == "bf16":
        return None
    if kind == "humming-w4a8":
        return HummingConfig.from_config(int4_config(group_size, 8))
    return CompressedTensorsConfig.from_config(int4_config(group_size, None))


def _fill(layer: torch.nn.Module) -> None:
    """Random integers, and small floats."""
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(0.01)
        else:
            parameter.data.random_(2**31 - 1)


# Names in tables; the glossary explains them.
PEERS: dict[str, Builder] = {
    "marlin-w4a16": peer("w4a16", "marlin"),
    "humming-w4a8": peer("humming-w4a8"),
}
WAYS: dict[str, Builder] = {
    "bf16": peer("bf16"),
    "morphoquant": ours(two_level=False),
    "morphoquant-two-level": ours(two_level=True),
    **PEERS,
}
