"""Quantized routed experts inside vLLM: refusals, parameters, checks after loading, the call of the op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig

from morphoquant_vllm import backends, ops
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, ExpertsSpec
from morphoquant_vllm.format.values import check_values
from morphoquant_vllm.host_memory import release_freed_memory
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.experts import ExpertsRecord
from morphoquant_vllm.numerics.linear import WeightRecord
from morphoquant_vllm.plugin import dummy_weights
from morphoquant_vllm.plugin.counted_layer import CountedExperts
from morphoquant_vllm.plugin.experts_loading import ExpertsParameters, flattened
from morphoquant_vllm.plugin.modality_bus import ModalityBus, rows_of_step
from morphoquant_vllm.plugin.parameters import check_ranks

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from morphoquant_vllm.handles import BoundExperts
    from morphoquant_vllm.plugin.escape_watch import EscapeWatch

SIXTEEN_BIT = "leave these experts in 16 bit: calibrate with --ignore '*.experts.*'"


def refuse_unserved(name: str, layer: RoutedExperts, experts: ExpertsSpec) -> None:
    """Refuse a mixture of experts that the op does not compute, or an engine's setting that does not fit."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    clamps = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    unserved = {
        f"activation '{moe.activation.value}'": moe.activation is not MoEActivation.SILU,
        "biases of experts": moe.has_bias,
        "a clamped or scaled SwiGLU": any(value is not None for value in clamps),
        "router weights on the input of experts": layer.apply_router_weight_on_input,
        "shared experts inside the routed ones": layer.expert_map_manager.num_fused_shared_experts > 0,
    }
    for problem, holds in unserved.items():
        if holds:
            raise MorphoQuantError(f"{name}: {problem} cannot be served with quantized experts; {SIXTEEN_BIT}")
    settings = {
        "--enable-eplb": parallel.enable_eplb,
        "--enable-lora": moe.is_lora_enabled,
        # Their tokens come from other ranks, whose rows are not known here.
        "--data-parallel-size above 1": parallel.dp_size > 1,
        "--prefill-context-parallel-size above 1": parallel.pcp_size > 1,
    }
    for setting, holds in settings.items():
        if holds:
            raise MorphoQuantError(f"{name}: quantized experts are not served with {setting}; start without it")
    sizes = {
        "experts": (moe.num_experts, experts.count),
        "hidden_size": (moe.hidden_dim, experts.in_features),
        "moe_intermediate_size": (moe.intermediate_size, experts.intermediate_features),
    }
    for size, (models, files) in sizes.items():
        if models != files:
            raise MorphoQuantError(
                f"{name}: the model has {size} {models}, the checkpoint {files}; config.json does not belong to these "
                "weights"
            )


def refuse_sixteen_bit(prefix: str, layer: RoutedExperts, is_cpu: bool) -> None:
    """Refuse 16-bit experts under expert parallelism on a CPU: vLLM's kernel there takes every expert for local."""
    if is_cpu and layer.moe_config.moe_parallel_config.use_ep:
        raise MorphoQuantError(
            f"{prefix}: vLLM's CPU kernel for 16-bit experts does not know which of them lie on a rank; serve without "
            "--enable-expert-parallel, or quantize these experts"
        )


class MorphoQuantExpertsMethod(FusedMoEMethodBase):
    """Quantization method of the routed experts of one layer; `name` is that of their list, in vLLM's names."""

    # The context in which vLLM loads the weights of a model: a refusal inside becomes the last line of the log.
    keep_refusal: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        layer: RoutedExperts,
        name: str,
        experts: ExpertsSpec,
        bus: ModalityBus,
        watch: EscapeWatch | None = None,
    ) -> None:
        super().__init__(layer.moe_config)
        refuse_unserved(name, layer, experts)
        self.spec, self.name, self.experts, self.bus, self.watch = bus.spec, name, experts, bus, watch
        self.ranks = layer.moe_config.moe_parallel_config.tp_size
        check_ranks(bus.spec, f"{name}.0.down_proj", experts.expert_layers(name, 0)[f"{name}.0.down_proj"], self.ranks)
        self.activation_dtype = torch.get_default_dtype()
        self.backend = ""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.activation_dtype = params_dtype
        self.parameters = ExpertsParameters(
            self.name,
            self.spec,
            self.experts,
            rank=layer.moe_config.moe_parallel_config.tp_rank,
            ranks=self.ranks,
            local_expert=layer.expert_map_manager.map_global_to_local,
        )
        for tensor, parameter in self.parameters.make(num_experts).items():
            layer.register_parameter(tensor, parameter)
        load = layer.load_weights
        layer.load_weights = lambda weights: load(flattened(weights))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if self.backend:
            raise MorphoQuantError(
                f"{self.name}: quantized experts are not loaded again into a running engine; start a new server"
            )
        dummy = get_current_vllm_config().load_config.load_format == "dummy"
        if not dummy:
            self.parameters.check_loaded()
        tensors = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
        for name in tensors:
            delattr(layer, name)
        gate_up, down = (
            {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in ("w13_", "w2_")
        )
        del tensors
        # Channels are numbered over the whole K; this rank's start here.
        first = layer.moe_config.moe_parallel_config.tp_rank * down["channel_order"].shape[1]
        for tensor in ("channel_order", "massive_channel"):
            down[tensor] -= first
        if dummy:
            dummy_weights.fill(gate_up)
            for expert in range(down["gain"].shape[0]):
                dummy_weights.fill({tensor: values[expert] for tensor, values in down.items()})
        self._check_values(layer, gate_up, down)
        record = record_of_stacked(self.experts.scale_scheme, gate_up, down)
        device = record.down.codes.device
        self.backend = backends.select_backend(device)
        prepared = backends.prepare_experts(self.name, record, self.activation_dtype, self.backend)
        del gate_up, down
        handle = ops.bind_experts(prepared, record.down.absorbed_bias, self._counted(record))
        layer.register_buffer("experts_handle", handle, persistent=False)
        layer.register_buffer("modality", self.bus.rows(device), persistent=False)
        if device.type == "cpu":
            del record
            release_freed_memory()

    def _counted(self, record: ExpertsRecord) -> Callable[[BoundExperts], BoundExperts] | None:
        """The wrap of the bound experts that counts the escapes of their input; None if it does not count."""
        if self.watch is None:
            return None
        # The quantizer of a backend is prepared together with a weight: any of them.
        _, prepared = backends.BACKENDS[self.backend].prepare(record.expert(0)[0], record.input)
        parallel = self.moe.moe_parallel_config
        rank = int(parallel.ep_rank if parallel.use_ep else parallel.tp_rank)
        counter = self.watch.counter(
            self.name, rank, split=False, backend=self.backend, prepared=prepared, record=record.input
        )
        return None if counter is None else partial(CountedExperts, counter=counter)

    def _check_values(self, layer: RoutedExperts, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> None:
        """Check the values of each linear of this rank's experts."""
        shared = {tensor: gate_up[tensor] for tensor in INPUT_TENSORS}
        along_n = {"absorbed_bias": 2}
        for expert in range(self.experts.count):
            local = layer.expert_map_manager.map_global_to_local(expert)
            if local < 0:
                continue
            halves = {
                tensor: values[local].chunk(2, along_n.get(tensor, 0))
                for tensor, values in gate_up.items()
                if tensor not in shared
            }
            layers = [
                shared | {tensor: pair[0] for tensor, pair in halves.items()},
                shared | {tensor: pair[1] for tensor, pair in halves.items()},
                {tensor: values[local] for tensor, values in down.items()},
            ]
            named = self.experts.expert_layers(self.name, expert).items()
            for (name, settings), tensors in zip(named, layers, strict=True):
                blocks = self.spec.tensor_parallel // self.ranks
                check_values(name, tensors, self.spec.any_row, parallel=settings.parallel, blocks=blocks)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        # For a kernel of vLLM's own, which is not called.
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        # vLLM computes shared experts itself.
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        rows = rows_of_step(layer.modality, x, self.spec.any_row)
        y: Tensor = ops.bound_experts(x, rows, topk_weights.float(), topk_ids, layer.experts_handle)
        return y


def record_of_stacked(scale_scheme: str, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> ExpertsRecord:
    """The record of stacked tensors by their stored names; weights are not copied."""
    each = zip(*(down[tensor].unbind() for tensor in INPUT_TENSORS), strict=True)
    intermediate = [activation_record(*expert) for expert in each]
    return ExpertsRecord(
        _weights(scale_scheme, gate_up),
        activation_record(*(gate_up[tensor] for tensor in INPUT_TENSORS)),
        _weights(scale_scheme, down),
        ActivationRecord(*map(torch.stack, zip(*intermediate, strict=True))),
    )


def _weights(scale_scheme: str, tensors: dict[str, Tensor]) -> WeightRecord:
    codes, scale, absorbed_bias, *two_level = (tensors[tensor] for tensor in OUTPUT_TENSORS[scale_scheme])
    channel_scale = two_level[0] if two_level else codes.new_empty((codes.shape[0], 0), dtype=torch.float32)
    # One sum over the blocks of K, as numerics.linear.weight_record adds them up.
    return WeightRecord(codes, scale, channel_scale, absorbed_bias.double().sum(1).float())
