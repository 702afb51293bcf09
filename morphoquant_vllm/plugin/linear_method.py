"""The quantized linear inside vLLM: creates parameters, checks the loaded tensors, calls the op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from morphoquant_vllm import backends, ops
from morphoquant_vllm.backends import Records
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, LayerSpec, input_blocks
from morphoquant_vllm.format.values import check_values
from morphoquant_vllm.host_memory import release_freed_memory
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record
from morphoquant_vllm.plugin import dummy_weights, fusion, sharded_state
from morphoquant_vllm.plugin.counted_layer import CountedLayer, Counter, counter_of_linear
from morphoquant_vllm.plugin.linear_checks import check_bias_presence, check_outputs, check_shapes
from morphoquant_vllm.plugin.mlp_channel_order import MlpOrder, both_halves, reorder_inputs, reorder_outputs
from morphoquant_vllm.plugin.modality_bus import ModalityBus, rows_of_step
from morphoquant_vllm.plugin.parameters import LoadLog, make_parameters
from morphoquant_vllm.plugin.reload import ReloadCheck, replace_records

if TYPE_CHECKING:
    from morphoquant_vllm.handles import Bound
    from morphoquant_vllm.plugin.escape_watch import EscapeWatch


@register_weight_loader_v2_supported_method
class MorphoQuantLinearMethod(LinearMethodBase):
    """Quantization method of one (fused) linear layer.

    `shards` are the settings of its checkpoint layers, by vLLM's names, in the order of the output. `bus` has the
    settings of the checkpoint, and the rows of the model's tokens. gate_up_proj and down_proj share an `mlp` if its
    channels may be renumbered. The layers of a model share a `reload_check`. `watch` counts the escapes of some layers.
    `saved` is the manifest of the state from which vLLM loads this rank, if it does.
    """

    # The context in which vLLM loads the weights of a model: a refusal inside becomes the last line of the log.
    keep_refusal: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        shards: dict[str, LayerSpec],
        bus: ModalityBus,
        mlp: MlpOrder | None = None,
        reload_check: ReloadCheck | None = None,
        watch: EscapeWatch | None = None,
        saved: sharded_state.RankState | None = None,
    ) -> None:
        self.spec = bus.spec
        self.saved = saved
        self.bus = bus
        self.mlp = mlp
        self.reload_check = reload_check
        self.watch = watch
        self.counter: Counter | None = None
        # True once the channels between gate_up_proj and down_proj are in down_proj's order.
        self.renumbered = False
        self.shards = shards
        self.layer_spec = next(iter(shards.values()))
        self.name = next(iter(shards))
        self.load_log = LoadLog()
        self.weight_size = self.activation_size = 0
        self.backend = ""
        self.activation_dtype = torch.get_default_dtype()
        self.activation_device = torch.get_default_device()
        self.takes_adapters = self.dummy = False
        # gate_up_proj's bias as it is served, if its channels are renumbered.
        self._bias_in_order: Tensor | None = None
        # True from the moment when vLLM has loaded the layer again until the end of that reload.
        self.loaded_again = False
        # True while some quantized layers of the engine have weights of another checkpoint than others.
        self.mixed = False
        # The records that are served, once the layer is bound.
        self.served: Records | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_shapes(layer, input_size, self.name, self.layer_spec, self.spec)
        check_outputs(layer, output_size, self.shards)
        self.activation_dtype = params_dtype
        config = get_current_vllm_config()
        self.takes_adapters = config.lora_config is not None
        self.dummy = config.load_config.load_format == "dummy"
        # vLLM copies the compiler's settings when a model has all its layers, before weights are loaded.
        fusion.install(config, backends.select_backend(torch.get_default_device()))
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        fused = isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear))
        parameters = make_parameters(
            self.name,
            in_features=input_size_per_partition,
            out_features=sum(output_partition_sizes),
            layer=self.layer_spec,
            rows=len(self.spec.rows),
            blocks=input_blocks(self.layer_spec, self.spec.tensor_parallel) * input_size_per_partition // input_size,
            shards=len(self.shards),
            watch=lambda tensor: self.load_log.watch(tensor, loader, fused),
        )
        if self.saved is not None:
            self._make_saved(layer, self.saved, {tensor: parameter.data for tensor, parameter in parameters.items()})
            return
        for tensor, parameter in parameters.items():
            layer.register_parameter(tensor, parameter)

    def _make_saved(self, layer: torch.nn.Module, saved: sharded_state.RankState, tensors: dict[str, Tensor]) -> None:
        """Make the buffers of a saved state. The backend checks valid `tensors` of the layer's shapes."""
        if self.watch is not None:
            raise MorphoQuantError(
                "--additional-config: watch_escapes does not count in a saved state; serve the checkpoint itself"
            )
        dummy_weights.fill(tensors)
        self._select_backend(tensors)
        self._checked_records(tensors)
        if saved.backend != self.backend or self.name not in saved.layers:
            raise MorphoQuantError(
                f"{self.name}: the state was saved by the backend '{saved.backend}' for other layers than those that "
                f"'{self.backend}' serves here; {sharded_state.SAVE_AGAIN}"
            )
        # The order of an MLP's channels goes with the state.
        self.renumbered = saved.renumbered
        sharded_state.make_tensors(layer, saved.layers[self.name])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay the loaded tensors out and bind the layer. If vLLM loads it again, replace what is served."""
        again = self.loaded_again = self.served is not None
        if self.saved is not None:
            self._bind_saved(layer, self.saved.layers[self.name], again)
            return
        if again and self.reload_check is not None:
            self.reload_check.check(get_current_vllm_config(), self.spec)
        tensors = self._take_loaded(layer)
        if not again:
            order = self._take_order(layer, tensors)
            self.renumbered = order is not None
            self._bind(layer, self._reorder(layer, tensors, order))
        elif self.renumbered:
            assert self.mlp is not None
            is_down = isinstance(layer, RowParallelLinear)
            self.mlp.reloaded.take(is_down, tensors, partial(self._replace, layer, tensors))
        else:
            self._replace(layer, tensors, None)
        if self.activation_device.type == "cpu":
            del tensors
            release_freed_memory()

    def _take_loaded(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """The layer's loaded and checked tensors, by the format's names; its parameters are removed."""
        tensors = {}
        for tensor, parameter in list(layer.named_parameters(recurse=False)):
            if tensor == "bias":
                continue
            if not self.dummy:
                self.load_log.check(self.name, tensor, len(self.shards))
            tensors[tensor] = parameter.data
            delattr(layer, tensor)
        check_bias_presence(layer, self.shards)
        row_parallel = isinstance(layer, RowParallelLinear)
        rank, size = (int(layer.tp_rank), int(layer.tp_size)) if row_parallel else (0, 1)  # type: ignore[arg-type]
        # Channels are numbered over the whole K; this rank's channels start at rank * K / size.
        first_channel = rank * tensors["channel_order"].numel()
        for tensor in ("channel_order", "massive_channel"):
            tensors[tensor] = tensors[tensor] - first_channel
        if self.dummy:
            dummy_weights.fill(tensors)
        check_values(
            self.name,
            tensors,
            self.spec.any_row,
            parallel=self.layer_spec.parallel,
            blocks=self.spec.tensor_parallel // size,
        )
        return tensors

    def _select_backend(self, tensors: dict[str, Tensor]) -> None:
        """Let the backend of the tensors' device serve the layer."""
        self.activation_device = tensors["weight_codes"].device
        self.backend = backends.select_backend(self.activation_device)

    def _checked_records(self, tensors: dict[str, Tensor]) -> tuple[WeightRecord, ActivationRecord]:
        """The canonical records of `tensors`, which the backend serves."""
        activation = activation_record(*(tensors[tensor] for tensor in INPUT_TENSORS))
        weight = weight_record(*(tensors[tensor] for tensor in OUTPUT_TENSORS[self.layer_spec.scale_scheme]))
        backends.BACKENDS[self.backend].check(self.name, weight, activation, self.activation_dtype)
        return weight, activation

    def _prepared(self, tensors: dict[str, Tensor]) -> tuple[Records, ActivationRecord]:
        """Both records as the backend prepares them, and the canonical one of the activation."""
        weight, activation = self._checked_records(tensors)
        return backends.BACKENDS[self.backend].prepare(weight, activation), activation

    def _bind(self, layer: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
        self._select_backend(tensors)
        prepared, activation = self._prepared(tensors)
        if self.watch is not None:
            split = isinstance(layer, RowParallelLinear)
            self.counter = counter_of_linear(
                self.watch, layer, self.name, split=split, backend=self.backend, prepared=prepared[1], record=activation
            )
        self._serve(layer, prepared, None if self.counter is None else partial(CountedLayer, counter=self.counter))

    def _bind_saved(self, layer: torch.nn.Module, shapes: tuple[sharded_state.Shapes, ...], again: bool) -> None:
        if again:
            raise MorphoQuantError(
                f"{self.name}: was loaded from a saved state and is not loaded again into a running engine; start a "
                "new server"
            )
        check_bias_presence(layer, self.shards)
        self.weight_size, self.activation_size = map(len, shapes)
        prepared = self.records(layer)
        for name, _ in list(layer.named_buffers(recurse=False)):
            delattr(layer, name)
        self._serve(layer, prepared, None)

    def _serve(self, layer: torch.nn.Module, prepared: Records, wrap: Callable[[Bound], Bound] | None) -> None:
        """Bind the layer to its records and keep them as its buffers, which vLLM saves in a sharded state."""
        try:
            handle = ops.bind(*prepared, getattr(layer, "bias", None), self.activation_dtype, self.backend, wrap)
        except MorphoQuantError as problem:
            raise MorphoQuantError(f"{self.name}: {problem}") from None
        prepared[0][-1] = handle
        self.served = prepared
        self.weight_size, self.activation_size = (len(record) for record in prepared)
        for kind, record in zip(("weight", "activation"), prepared, strict=True):
            for index, buffer in enumerate(record):
                layer.register_buffer(sharded_state.record_name(kind, index), buffer)
        if self.takes_adapters:
            # vLLM's layers for LoRA ask a linear's weight for its device. It is no parameter, and has no elements.
            layer.weight = torch.empty(0, device=self.activation_device)
        if not self.layer_spec.fixed_row:
            layer.register_buffer("modality", self.bus.rows(self.activation_device), persistent=False)

    def _replace(self, layer: torch.nn.Module, tensors: dict[str, Tensor], order: Tensor | None) -> None:
        """Serve other tensors from the same memory. vLLM then gives the layer its buffers back."""
        assert self.served is not None
        prepared, activation = self._prepared(self._reorder(layer, tensors, order))
        replace_records(self.name, self.served, prepared)
        if self.counter is not None:
            self.counter.take_intervals(activation)

    def _take_order(self, layer: torch.nn.Module, tensors: dict[str, Tensor]) -> Tensor | None:
        """down_proj's channel order, int64 [K], if the channels before it are renumbered. May be called once."""
        if self.mlp is None:
            return None
        if isinstance(layer, RowParallelLinear):
            return self.mlp.order_of_inputs()
        return self.mlp.order_for_outputs(layer, tensors["weight_codes"].shape[0])

    def _reorder(self, layer: torch.nn.Module, tensors: dict[str, Tensor], order: Tensor | None) -> dict[str, Tensor]:
        """`tensors` with the channels between gate_up_proj and down_proj in `order`; with None as they are.

        gate_up_proj's bias is permuted in place.
        """
        if order is None:
            return tensors
        # The other layer's tensors may have been on another device (CPU offload).
        order = order.to(tensors["weight_codes"].device)
        if isinstance(layer, RowParallelLinear):
            return reorder_inputs(tensors, order)
        outputs = both_halves(order)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            # A reload may bring no biases: those that are served are in order already.
            if self._bias_in_order is None or not torch.equal(bias.data, self._bias_in_order):
                bias.data.copy_(bias.data[outputs])
            self._bias_in_order = bias.data.clone()
        return reorder_outputs(tensors, outputs)

    def modality(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """Row of each token of x [M, K], int32 [M or more], as the ops take it."""
        if not self.layer_spec.fixed_row:
            return rows_of_step(layer.modality, x, self.spec.any_row)  # type: ignore[arg-type]
        row = self.spec.rows.index(self.layer_spec.fixed_row)
        return torch.full(x.shape[:1], row, dtype=torch.int32, device=x.device)

    def records(self, layer: torch.nn.Module) -> Records:
        """The weight and activation records, which the ops of layers that are not bound take."""
        sizes = {"weight": self.weight_size, "activation": self.activation_size}
        weight, activation = (
            [getattr(layer, sharded_state.record_name(kind, index)) for index in range(size)]
            for kind, size in sizes.items()
        )
        return weight, activation

    def handle(self, layer: torch.nn.Module) -> Tensor:
        """The layer's handle: the last tensor of its weight record."""
        handle: Tensor = getattr(layer, sharded_state.record_name("weight", self.weight_size - 1))
        return handle

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # An unneeded view would hide the operation before it from the pass of `fusion`.
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = ops.bound_linear(flat, self.modality(layer, flat), self.handle(layer), bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
