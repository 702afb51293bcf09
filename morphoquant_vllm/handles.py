"""Layers that are bound to a backend, by the address of their handle. Only this module keeps them.

    keep(handle, layer)    when the layer is loaded
    layer_of(handle)       at each call: the address of the tensor is the key
    experts_of(handle)     the same of the routed experts of a layer

The handle is a weight that no other layer has. A compiled graph takes it like any weight, so layers share graphs, and a
cached graph serves the next process. A layer is removed when its handle is freed, before another tensor can take that
address. Weights that are loaded again into the same tensors keep their layer.
"""

from __future__ import annotations

import weakref
from typing import Protocol, cast

from torch import Tensor


class Bound(Protocol):
    """A bound layer. It does not hold its handle, which each call passes."""

    def linear(self, x: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of x [M, K]; inputs are checked."""

    def silu_mul_linear(self, gate_up: Tensor, modality: Tensor, handle: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] of silu(gate) * up, gate_up [M, 2K]; inputs are checked."""

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
        """y [M, N] of the RMSNorm of x [M, K], or of x + residual, and then that sum; inputs are checked."""


class BoundExperts(Protocol):
    """The bound experts of a layer. They do not hold the handle itself; another tensor may have its memory."""

    def experts(self, x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """y [M, K] of x [M, K]; inputs are checked."""


_LAYERS: dict[int, Bound | BoundExperts] = {}


def is_taken(tensor: Tensor) -> bool:
    """Whether this tensor is the handle of a live layer."""
    return tensor.data_ptr() in _LAYERS


def keep(handle: Tensor, layer: Bound | BoundExperts) -> None:
    """Keep a layer for as long as its handle lives."""
    address = handle.data_ptr()
    _LAYERS[address] = layer
    weakref.finalize(handle, _LAYERS.pop, address, None).atexit = False


def layer_of(handle: Tensor) -> Bound:
    """The layer of a handle that `ops.bind` gave; raises RuntimeError for a tensor that is no handle."""
    return cast(Bound, _find(handle))


def experts_of(handle: Tensor) -> BoundExperts:
    """The experts of a handle that `ops.bind_experts` gave; raises RuntimeError for a tensor that is no handle."""
    return cast(BoundExperts, _find(handle))


def _find(handle: Tensor) -> Bound | BoundExperts:
    try:
        return _LAYERS[handle.data_ptr()]
    except KeyError:
        raise RuntimeError("no layer is bound to this tensor: it is a copy of a handle, or was never one") from None
