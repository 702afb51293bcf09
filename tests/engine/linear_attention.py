"""How vLLM computes the gated delta rule on a CPU, inside the driver's process: both convolutions, and float32.

vLLM's CPU kernels of linear attention take bfloat16 alone. So that the quantized linears around them can be compared in
float32, steps in float32 are computed by transformers' functions, each request anew from its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

# The convolution of linear attention: vLLM's C++ or its torch path.
CONVOLUTIONS = ("c++", "torch")


@contextmanager
def linear_attention(convolution: str | None) -> Iterator[None]:
    """Within the context, vLLM convolves by `convolution`, of CONVOLUTIONS, and takes float32; None changes nothing."""
    if convolution is None:
        yield
        return
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    if not gdn_attention._CPU_GDN_ATTENTION_OPS_REGISTERED:
        gdn_attention.cpu_gdn_attention_core = _with_float32(gdn_attention.cpu_gdn_attention_core)
    # vLLM asks this when it packs the convolution's weight, and in every step.
    supported = torch.cpu._is_avx512_bf16_supported
    if convolution == "torch":
        torch.cpu._is_avx512_bf16_supported = lambda: False
    try:
        yield
    finally:
        torch.cpu._is_avx512_bf16_supported = supported


def _with_float32(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's op for bfloat16; for float32 the same from transformers' functions."""
    # Inputs of each request so far, by layer and place of its state.
    seen: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
        from vllm.forward_context import get_forward_context
        from vllm.utils.torch_utils import _resolve_layer_name

        context = get_forward_context()
        if mixed_qkv.dtype != torch.float32 or context.attn_metadata is None:
            original(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
        step = context.attn_metadata[layer.prefix]
        starts = step.non_spec_query_start_loc.tolist()
        for index, place in enumerate(step.non_spec_state_indices_tensor[: len(starts) - 1].tolist()):
            part = slice(starts[index], starts[index + 1])
            new = tuple(values[part].clone() for values in (mixed_qkv, b, a))
            key = (layer.prefix, place)
            if index < step.num_decodes or bool(step.has_initial_state[index]):
                new = tuple(torch.cat(pair) for pair in zip(seen[key], new, strict=True))
            seen[key] = new
            core_attn_out[part] = _gated_delta_rule(layer, *new)[starts[index] - starts[index + 1] :]

    # torch reads the op's schema from these.
    core.__annotations__ = {**get_type_hints(original), "return": None}
    return core


def _gated_delta_rule(layer: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The layer's attention over one whole request: mixed_qkv [M, channels] -> [M, heads, head size]."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    weight = layer.conv1d.weight
    padded = functional.pad(mixed_qkv.T[None], (weight.shape[-1] - 1, 0))
    mixed = functional.silu(functional.conv1d(padded, weight, groups=weight.shape[0]))[0].T
    # A rank has a part of the heads.
    key_size, value_size = layer.key_dim // layer.tp_size, layer.value_dim // layer.tp_size
    key_heads, value_heads = layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size
    query, key, value = mixed.split([key_size, key_size, value_size], dim=-1)
    copies = value_heads // key_heads
    heads = [part.unflatten(-1, (key_heads, -1)).repeat_interleave(copies, dim=-2) for part in (query, key)]
    output, _ = torch_chunk_gated_delta_rule(
        *(part[None] for part in heads),
        value.unflatten(-1, (value_heads, -1))[None],
        g=-layer.A_log.float().exp()[None, None] * functional.softplus(a + layer.dt_bias)[None],
        beta=b.sigmoid()[None],
        use_qk_l2norm_in_kernel=True,
    )
    return output[0]
