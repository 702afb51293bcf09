"""The custom ops that the plugin calls. Backends, and the choice of one, are in backends.py.

    morphoquant::act_quant(x, modality, activation, backend)             -> codes int8 [M, K], in permuted order
    morphoquant::linear(x, modality, weight, activation, bias, backend)  -> y [M, N], dtype of x
    morphoquant::silu_mul_linear(gate_up, ...)                           -> the same of x = silu(gate) * up

    x           [M, K], float32, bfloat16 or float16
    modality    int32 [M or more]: row of each token; entries past M are ignored, so one buffer serves every M.
                A token that the activation record recognizes as massive takes the last row instead.
    weight      tensors of a weight record. The last one is always absorbed_bias, float32 [R, N].
    activation  tensors of an activation record
    bias        [N], the layer's bias, or None
    backend     a key of backends.BACKENDS; its `prepare` made the records
    gate_up     [M, 2K]: gate and up side by side. Both operations round to their dtype, as in torch.

Layers in vLLM are bound to their backend when they are loaded, by `bind`, and called by a handle:

    morphoquant::bound_linear(x, modality, handle, bias)                -> y [M, N], as `linear`
    morphoquant::bound_silu_mul_linear(gate_up, modality, handle, bias) -> y [M, N], as `silu_mul_linear`

    handle      the layer's absorbed_bias, float32 [R, N]; its address identifies the layer

So a call looks up one address. A compiled graph takes the handle as any weight. So layers share graphs, and a cached
graph serves the next process. A layer lives as long as its handle. A copy of the handle is refused.

Two ops are RMSNorm (numerics/norm.py) and then `bound_linear`. x, residual [M, K] and norm_weight [K] have one dtype:

    morphoquant::rms_norm_linear(x, norm_weight, epsilon, modality, handle, bias)  -> y [M, N] of rms_norm(x)
    morphoquant::add_rms_norm_linear(x, residual, norm_weight, epsilon, modality, handle, bias)
        -> y [M, N] of rms_norm(x + residual), and x + residual [M, K]

The routed experts of a layer are bound by `bind_experts`, and called by a handle, too:

    morphoquant::bound_experts(x, modality, topk_weights, topk_ids, handle)  -> y [M, K], dtype of x

    topk_weights  float32 [M, T]: weights of the T experts of each token
    topk_ids      int32 or int64 [M, T]: those experts. An id below 0, or E and above, adds nothing
    handle        absorbed_bias of the experts' down_proj, float32 [E, R, K]

Two ops compute lm_head. They run if the backend of x's device has a `head`:

    morphoquant::head(x, codes, scale)     -> y [M, N], dtype of x; the optional 8-bit head, see numerics/head.py
    morphoquant::head_bfloat16(x, weight)  -> y [M, N]; the 16-bit head, for weights that the backend serves

The signatures are frozen: a new backend is a new entry of backends.BACKENDS, whose `prepare` is free in its layout of
the records. All ops are opaque to torch.compile, since they have fake implementations. Needs torch only, not vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm import handles
from morphoquant_vllm.backends import BACKENDS, PreparedExperts, check_inputs, select_backend
from morphoquant_vllm.numerics import norm as norm_numerics


@dataclass(frozen=True)
class _UncompiledLayer:
    """A bound layer of a backend without a `bind` function."""

    backend: str
    weight: list[Tensor]
    activation: list[Tensor]

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        return BACKENDS[self.backend].linear(x, modality, [*self.weight, handle], self.activation, bias)

    def silu_mul_linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        return _silu_mul_linear(x, modality, [*self.weight, handle], self.activation, bias, self.backend)

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        handle: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        normed, total = norm_numerics.normed(x, residual, norm_weight, epsilon)
        return self.linear(normed, modality, handle, bias), total


def bind(
    weight: list[Tensor],
    activation: list[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
    wrap: Callable[[handles.Bound], handles.Bound] | None = None,
) -> Tensor:
    """Bind a layer of prepared records, with the bias of its later calls, and return its handle.

    The handle replaces the weight record's last tensor, and usually is that tensor. The layer is freed with it.
    Calls go to `wrap` of the bound layer, if given.
    """
    *rest, handle = weight
    if handles.is_taken(handle):
        # Another layer has the same tensor.
        handle = handle.clone()
    own = BACKENDS[backend].bind
    layer = own([*rest, handle], activation, bias, dtype) if own else _UncompiledLayer(backend, rest, activation)
    handles.keep(handle, layer if wrap is None else wrap(layer))
    return handle


def bind_experts(
    experts: PreparedExperts,
    absorbed_bias: Tensor,
    wrap: Callable[[handles.BoundExperts], handles.BoundExperts] | None = None,
) -> Tensor:
    """Bind the prepared experts of a layer and return their handle; they are freed with it.

    `absorbed_bias` is that of their down_proj. Calls go to `wrap` of the experts, if given.
    """
    # The backend may keep that tensor, so the handle is a tensor of its own with the same memory.
    handle = absorbed_bias.detach()
    if handles.is_taken(handle):
        handle = handle.clone()
    handles.keep(handle, experts if wrap is None else wrap(experts))
    return handle


def _act_quant(x: Tensor, modality: Tensor, activation: list[Tensor], backend: str) -> Tensor:
    check_inputs(x, modality)
    return BACKENDS[backend].act_quant(x, modality, activation)


def _linear(
    x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None, backend: str
) -> Tensor:
    check_inputs(x, modality)
    return BACKENDS[backend].linear(x, modality, weight, activation, bias)


def _silu_mul_linear(
    gate_up: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None, backend: str
) -> Tensor:
    check_inputs(gate_up, modality)
    fused = BACKENDS[backend].silu_mul_linear
    if fused is not None:
        return fused(gate_up, modality, weight, activation, bias)
    gate, up = gate_up.chunk(2, dim=1)
    return BACKENDS[backend].linear(silu(gate) * up, modality, weight, activation, bias)


def _bound_linear(x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
    check_inputs(x, modality)
    return handles.layer_of(handle).linear(x, modality, handle, bias)


def _bound_silu_mul_linear(gate_up: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
    check_inputs(gate_up, modality)
    return handles.layer_of(handle).silu_mul_linear(gate_up, modality, handle, bias)


def _bound_experts(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, handle: Tensor) -> Tensor:
    check_inputs(x, modality)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids and topk_weights must be [{x.shape[0]}, T], got {list(topk_ids.shape)} and "
            f"{list(topk_weights.shape)}"
        )
    if topk_weights.dtype != torch.float32 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_weights must be float32 and topk_ids integers, got {topk_weights.dtype} and {topk_ids.dtype}"
        )
    return handles.experts_of(handle).experts(x, modality, topk_weights, topk_ids)


def _head(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    found = BACKENDS[select_backend(x.device)].head
    if found is None:
        raise RuntimeError(f"this backend has no kernels for lm_head on {x.device.type}; let vLLM compute it")
    return found.eight_bit(x, codes, scale)


def _head_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    found = BACKENDS[select_backend(x.device)].head
    if found is None or found.bfloat16 is None:
        raise RuntimeError(f"this backend has no kernels for a 16-bit lm_head on {x.device.type}; let vLLM compute it")
    return found.bfloat16(x, weight)


def _act_quant_fake(x: Tensor, modality: Tensor, activation: list[Tensor], backend: str) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def _linear_fake(
    x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor], bias: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], weight[-1].shape[-1]))


def _bound_fake(x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], handle.shape[1]))


def _head_fake(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _head_bfloat16_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _bound_experts_fake(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor, handle: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], handle.shape[2]))


def _rms_norm_linear(
    x: Tensor, norm_weight: Tensor, epsilon: float, modality: Tensor, handle: Tensor, bias: Tensor | None
) -> Tensor:
    check_inputs(x, modality)
    return handles.layer_of(handle).norm_linear(x, None, norm_weight, epsilon, modality, handle, bias)[0]


def _add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    handle: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_inputs(x, modality)
    y, total = handles.layer_of(handle).norm_linear(x, residual, norm_weight, epsilon, modality, handle, bias)
    assert total is not None
    return y, total


def _rms_norm_linear_fake(
    x: Tensor, norm_weight: Tensor, epsilon: float, modality: Tensor, handle: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], handle.shape[1]))


def _add_rms_norm_linear_fake(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    handle: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], handle.shape[1])), x.new_empty(x.shape)


_OPS: tuple[tuple[str, str, Callable[..., object], Callable[..., object]], ...] = (
    (
        "act_quant",
        "(Tensor x, Tensor modality, Tensor[] activation, str backend) -> Tensor",
        _act_quant,
        _act_quant_fake,
    ),
    (
        "linear",
        "(Tensor x, Tensor modality, Tensor[] weight, Tensor[] activation, Tensor? bias, str backend) -> Tensor",
        _linear,
        _linear_fake,
    ),
    (
        "silu_mul_linear",
        "(Tensor gate_up, Tensor modality, Tensor[] weight, Tensor[] activation, Tensor? bias, str backend) -> Tensor",
        _silu_mul_linear,
        _linear_fake,
    ),
    ("bound_linear", "(Tensor x, Tensor modality, Tensor handle, Tensor? bias) -> Tensor", _bound_linear, _bound_fake),
    (
        "bound_silu_mul_linear",
        "(Tensor gate_up, Tensor modality, Tensor handle, Tensor? bias) -> Tensor",
        _bound_silu_mul_linear,
        _bound_fake,
    ),
    (
        "bound_experts",
        "(Tensor x, Tensor modality, Tensor topk_weights, Tensor topk_ids, Tensor handle) -> Tensor",
        _bound_experts,
        _bound_experts_fake,
    ),
    ("head", "(Tensor x, Tensor codes, Tensor scale) -> Tensor", _head, _head_fake),
    ("head_bfloat16", "(Tensor x, Tensor weight) -> Tensor", _head_bfloat16, _head_bfloat16_fake),
    (
        "rms_norm_linear",
        "(Tensor x, Tensor norm_weight, float epsilon, Tensor modality, Tensor handle, Tensor? bias) -> Tensor",
        _rms_norm_linear,
        _rms_norm_linear_fake,
    ),
    (
        "add_rms_norm_linear",
        "(Tensor x, Tensor residual, Tensor norm_weight, float epsilon, Tensor modality, Tensor handle, Tensor? bias) "
        "-> (Tensor, Tensor)",
        _add_rms_norm_linear,
        _add_rms_norm_linear_fake,
    ),
)
# The operators live as long as this object does.
_LIBRARY = torch.library.Library("morphoquant", "DEF")
for _name, _schema, _implementation, _fake in _OPS:
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"morphoquant::{_name}", _fake, lib=_LIBRARY)

act_quant = torch.ops.morphoquant.act_quant
linear = torch.ops.morphoquant.linear
silu_mul_linear = torch.ops.morphoquant.silu_mul_linear
bound_linear = torch.ops.morphoquant.bound_linear
bound_silu_mul_linear = torch.ops.morphoquant.bound_silu_mul_linear
bound_experts = torch.ops.morphoquant.bound_experts
head = torch.ops.morphoquant.head
head_bfloat16 = torch.ops.morphoquant.head_bfloat16
rms_norm_linear = torch.ops.morphoquant.rms_norm_linear
add_rms_norm_linear = torch.ops.morphoquant.add_rms_norm_linear
