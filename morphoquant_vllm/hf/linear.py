"""A quantized linear as a module of transformers: a checkpoint's tensors as buffers, and how it computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, LayerSpec, TensorSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.values import check_values
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.exact import linear_exact
from morphoquant_vllm.numerics.linear import WeightRecord, linear, weight_record

logger = logging.getLogger(__name__)
# Activations of another dtype run on the torch reference.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RunningPass(threading.local):
    """The forward pass of a model in one thread; every thread has a state of its own."""

    # How many of the watched modules are running, one inside the other.
    depth = 0
    # Row of every token of the pass, int32 [tokens]; None if its tokens are unknown.
    modality: Tensor | None = None

    def __reduce__(self) -> tuple[type[RunningPass], tuple[()]]:
        # A copied or saved model starts without a pass.
        return RunningPass, ()


@dataclass
class Mode:
    """The mode in which the quantized linears of one model compute; they share it. `settings.configure` changes it."""

    # Index of the row that serves a token of unknown modality.
    row: int
    # Whether values that escape the 4-bit grid bypass it unrounded.
    exact: bool = False
    # Whether the torch reference computes, instead of the kernels of the device.
    reference: bool = False
    running: RunningPass = field(default_factory=RunningPass)
    # Hooks that note the tokens' rows in `running`; empty if one row serves all.
    hooks: list[RemovableHandle] = field(default_factory=list)

    # A compiler would take what it finds in `running` for constant.
    @torch.compiler.disable
    def modality_of(self, x: Tensor) -> Tensor:
        """Row of each token of x [M, K] by its modality, int32 [M]; `row` if the running pass has not M tokens."""
        noted = self.running.modality
        if noted is None or noted.numel() != x.shape[0]:
            return torch.full(x.shape[:1], self.row, dtype=torch.int32, device=x.device)
        return noted.to(x.device)


class StoredTensors(nn.Module):
    """A linear's tensors as buffers that keep the format's dtypes, whatever the model is cast to."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self.names = tuple(specs)
        for tensor, want in specs.items():
            self.register_buffer(tensor, torch.empty(want.shape, dtype=want.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredTensors:
        """Follow the model to another device, but keep the format's dtypes."""

        bias = getattr(self, "bias", None)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their name below the layer."""
        return {name: self.get_buffer(name) for name in self.names}


class MorphoQuantLinear(StoredTensors):
    """One quantized linear.

    The kernels of the device compute it; the torch reference does if the mode says so, or if no kernels serve the
    layer. The kernels' records lie beside the buffers and are made by the first call on a device.
    """

    def __init__(self, name: str, layer: LayerSpec, spec: QuantizationSpec, mode: Mode) -> None:
        super().__init__(spec.stored_tensors(name))
        self._prepared: tuple[torch.device, backends.Prepared] | None = None
        self.name, self.spec, self.mode = name, spec, mode
        self.output_tensors = OUTPUT_TENSORS[layer.scale_scheme]
        # A tower's patches have no token ids.
        self.fixed_row = spec.rows.index(layer.fixed_row) if layer.fixed_row else None
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # Empty: some models of transformers, as NanoChat, draw the weights of their linears by this name.
        self.weight = torch.empty(0)
        # The bias has the model's dtype, as in vLLM.
        self.bias = nn.Parameter(torch.empty(layer.out_features), requires_grad=False) if layer.bias else None
        self.register_load_state_dict_post_hook(take_loaded)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MorphoQuantLinear:
        self._prepared = None
        super()._apply(fn, recurse)
        return self

    def check(self) -> None:
        """Raise MorphoQuantError naming the layer if loaded values break a rule of the format."""
        check_unless_meta(self.name, self.tensors(), self.spec)

    def modality_of(self, x: Tensor) -> Tensor:
        """Row of each token of x [M, K], int32 [M]: the fixed row of a tower's layer, or by the mode."""
        if self.fixed_row is not None:
            return torch.full(x.shape[:1], self.fixed_row, dtype=torch.int32, device=x.device)
        return self.mode.modality_of(x)

    def activation(self) -> ActivationRecord:
        """The record that quantizes the input."""
        return activation_record(*(self.get_buffer(name) for name in INPUT_TENSORS))

    def weights(self) -> WeightRecord:
        """The record of the weights."""
        return weight_record(*(self.get_buffer(name) for name in self.output_tensors))

    def prepared(self, device: torch.device, dtype: torch.dtype) -> backends.Prepared:
        """The records for the kernels that serve `device`, or for the reference if they refuse the layer."""
        if self._prepared is None or self._prepared[0] != device:
            records = self.weights(), self.activation()
            try:
                prepared = backends.prepare_layer(self.name, *records, dtype)
            except MorphoQuantError as refusal:
                logger.warning("%s (it runs on the torch reference, which is slow)", refusal)
                prepared = backends.prepare_layer(self.name, *records, dtype, "reference")
            self._prepared = device, prepared
        return self._prepared[1]

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """y [..., N] of x [..., K], in its dtype."""
        flat = x.reshape(-1, x.shape[-1])
        rows = self.modality_of(flat)
        if self.mode.exact or self.mode.reference or x.dtype not in KERNEL_DTYPES:
            define = linear_exact if self.mode.exact else linear
            y = define(flat, rows, self.weights(), self.activation(), self.bias)
        else:
            y = self.prepared(x.device, x.dtype).linear(flat, rows, self.bias)
        return y.view(*x.shape[:-1], -1)


def take_loaded(module: Any, *_: Any) -> None:
    """After `load_state_dict` of a quantized linear, or experts: check the values, and drop records of the old ones."""
    module._prepared = None
    module.check()


def check_unless_meta(name: str, tensors: Mapping[str, Tensor], spec: QuantizationSpec) -> None:
    """Check the values of a linear's tensors; a model without weights has none."""
    if not any(tensor.is_meta for tensor in tensors.values()):
        parallel = spec.linears[name].parallel
        check_values(name, tensors, spec.any_row, parallel=parallel, blocks=spec.tensor_parallel)
