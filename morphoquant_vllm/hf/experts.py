"""The quantized experts of a block as a module of transformers: a checkpoint's tensors, and how they compute.

transformers merges a block's experts into two parameters; its module is called with the router's choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, ExpertsSpec, input_holder
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.hf.linear import KERNEL_DTYPES, Mode, StoredTensors, check_unless_meta, take_loaded
from morphoquant_vllm.numerics.activation import ActivationRecord, activation_record
from morphoquant_vllm.numerics.exact import experts_exact
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts, experts_record
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record

logger = logging.getLogger(__name__)
# transformers' parameter of gate and up of all experts, [E, 2I, K]; that of down is `down_proj`, [E, K, I].
MERGED = "gate_up_proj"


class MorphoQuantExperts(nn.Module):
    """The list of experts `name`. Modules below have the names of the file, so transformers loads their tensors.

    The kernels of the device compute it; the torch reference does if the mode says so, or if no kernels serve these
    experts. The kernels' records lie beside the buffers and are made by the first call on a device.
    """

    # Qwen3-Omni-MoE's class initialises its experts' parameters by these names.
    gate_up_proj = down_proj = torch.empty(0)

    def __init__(self, name: str, spec: QuantizationSpec, mode: Mode) -> None:
        super().__init__()
        self._prepared: tuple[torch.device, backends.PreparedExperts] | None = None
        self.name, self.spec, self.mode = name, spec, mode
        self.output_tensors = OUTPUT_TENSORS[spec.experts[name].scale_scheme]
        for index in range(spec.experts[name].count):
            expert = nn.Module()
            for layer in spec.experts[name].expert_layers(name, index):
                expert.add_module(layer.rpartition(".")[2], StoredTensors(spec.stored_tensors(layer)))
            self.add_module(str(index), expert)
        self.register_load_state_dict_post_hook(take_loaded)

    def extra_repr(self) -> str:
        experts = self.spec.experts[self.name]
        return f"count={experts.count}, in={experts.in_features}, intermediate={experts.intermediate_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MorphoQuantExperts:
        self._prepared = None
        super()._apply(fn, recurse)
        return self

    def check(self) -> None:
        """Raise MorphoQuantError naming the linear if loaded values break a rule of the format."""
        holder = self._tensors(input_holder(self.name))
        shared = {tensor: holder[tensor] for tensor in INPUT_TENSORS}
        for layer in self.spec.experts[self.name].layers(self.name):
            check_unless_meta(layer, shared | self._tensors(layer), self.spec)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y [M, K] of hidden_states [M, K], in its dtype; index and weights [M, T] are those of the router."""
        rows, weights = self.mode.modality_of(hidden_states), top_k_weights.float()
        if not self.mode.exact and not self.mode.reference and hidden_states.dtype in KERNEL_DTYPES:
            prepared = self.prepared(hidden_states.device, hidden_states.dtype)
            return prepared.experts(hidden_states, rows, weights, top_k_index)
        # Records of the chosen experts alone: a step of one token needs few of them.
        count = self.spec.experts[self.name].count
        local = (top_k_index >= 0) & (top_k_index < count)
        chosen = top_k_index[local].unique()
        if chosen.numel() == 0:
            return torch.zeros_like(hidden_states)
        place = torch.full((count,), -1, device=chosen.device)
        place[chosen] = torch.arange(chosen.numel(), device=chosen.device)
        ids = torch.where(local, place[top_k_index.clamp(0, count - 1)], -1)
        compute = experts_exact if self.mode.exact else experts
        return compute(hidden_states, rows, weights, ids, self._record(chosen.tolist()))

    def prepared(self, device: torch.device, dtype: torch.dtype) -> backends.PreparedExperts:
        """The records for the kernels that serve `device`, or for the reference if they refuse the experts."""
        if self._prepared is None or self._prepared[0] != device:
            record = self._record(list(range(self.spec.experts[self.name].count)))
            try:
                prepared = backends.prepare_experts(self.name, record, dtype)
            except MorphoQuantError as refusal:
                logger.warning("%s (they run on the torch reference, which is slow)", refusal)
                prepared = backends.prepare_experts(self.name, record, dtype, "reference")
            self._prepared = device, prepared
        return self._prepared[1]

    def _record(self, chosen: list[int]) -> ExpertsRecord:
        down = [f"{self.name}.{index}.down_proj" for index in chosen]
        return experts_record(
            [self._weights(f"{self.name}.{index}.gate_proj") for index in chosen],
            [self._weights(f"{self.name}.{index}.up_proj") for index in chosen],
            self._activation(input_holder(self.name)),
            [self._weights(layer) for layer in down],
            [self._activation(layer) for layer in down],
        )

    def _tensors(self, layer: str) -> dict[str, Tensor]:
        stored = self.get_submodule(layer.removeprefix(f"{self.name}."))
        assert isinstance(stored, StoredTensors)
        return stored.tensors()

    def _weights(self, layer: str) -> WeightRecord:
        tensors = self._tensors(layer)
        return weight_record(*(tensors[tensor] for tensor in self.output_tensors))

    def _activation(self, layer: str) -> ActivationRecord:
        tensors = self._tensors(layer)
        return activation_record(*(tensors[tensor] for tensor in INPUT_TENSORS))


def check_merged(name: str, module: nn.Module, experts: ExpertsSpec) -> None:
    """Refuse a module of transformers that does not hold the experts of the file."""
    wanted = {
        MERGED: (experts.count, 2 * experts.intermediate_features, experts.in_features),
        "down_proj": (experts.count, experts.in_features, experts.intermediate_features),
    }
    found = {parameter: tuple(tensor.shape) for parameter, tensor in module.named_parameters(recurse=False)}
    if found != wanted:
        raise MorphoQuantError(
            f"{name}: the model has {found}, the checkpoint {wanted}; config.json does not belong to these weights"
        )
    # transformers has several classes of one activation.
    probe, activation = torch.tensor([-1.0, 2.0], device="cpu"), getattr(module, "act_fn", None)
    if activation is None or not torch.equal(activation(probe), silu(probe)):
        raise MorphoQuantError(f"{name}: the model's experts have another activation than silu; copy config.json again")
