"""Parameters of routed experts, stacked over this rank's experts, and the loaders that cut checkpoint tensors for them.

vLLM calls gate_proj w1, up_proj w3 and down_proj w2. It joins w1 and w3: the parameters are `w13_<tensor>` and
`w2_<tensor>`. It skips expert tensors that it does not know in silence, so each loaded one is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import (
    INPUT_TENSORS,
    OUTPUT_TENSORS,
    ExpertsSpec,
    TensorSpec,
    input_holder,
    stored_name,
    tensor_specs,
)
from morphoquant_vllm.format.schema import QuantizationSpec

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# The dimension over outputs of each tensor of gate_proj and up_proj, which column-parallel ranks cut.
_ALONG_N = dict.fromkeys(("weight_codes", "weight_scale", "weight_level", "weight_channel_scale"), 0)
_ALONG_N |= {"absorbed_bias": 2}
# The dimension over K, or over blocks of K, of each tensor of down_proj, which row-parallel ranks cut.
_ALONG_K = dict.fromkeys(("weight_codes", "weight_scale", "weight_level", "modality_mask", "centre"), 1)
_ALONG_K |= dict.fromkeys(("activation_step", "channel_order", "absorbed_bias"), 0)
_ALONG_K |= dict.fromkeys(("massive_channel", "massive_low", "massive_high"), 0)


class ExpertsParameters:
    """One rank's parameters of the list of experts `name`, and what was loaded into them.

    `local_expert` gives an expert's place on this rank, or -1 if it lies on another one.
    """

    def __init__(
        self,
        name: str,
        spec: QuantizationSpec,
        experts: ExpertsSpec,
        *,
        rank: int,
        ranks: int,
        local_expert: Callable[[int], int],
    ) -> None:
        self.name, self.experts = name, experts
        self.rank, self.ranks = rank, ranks
        self.local_expert = local_expert
        column, _, row = experts.expert_layers(name, 0).values()
        width = experts.intermediate_features // ranks
        self.rows = rows = len(spec.rows)
        # Tensors of one expert on this rank.
        self.gate_up = tensor_specs(replace(column, out_features=width), rows, 1)
        self.down = tensor_specs(replace(row, in_features=width), rows, spec.tensor_parallel // ranks)
        self._loaded: set[tuple[str, int, str]] = set()

    def make(self, count: int) -> dict[str, Parameter]:
        """Parameters of `count` experts by name; each has its loader."""
        made = {}
        for tensor, spec in self.gate_up.items():
            stacked = spec if tensor in INPUT_TENSORS else _stacked(_doubled(spec, _ALONG_N[tensor]), count)
            load = self._load_input if tensor in INPUT_TENSORS else self._load_gate_up
            made[f"w13_{tensor}"] = _parameter(stacked, tensor, load, self.rows)
        for tensor, spec in self.down.items():
            made[f"w2_{tensor}"] = _parameter(_stacked(spec, count), tensor, self._load_down, self.rows)
        return made

    def _load_input(self, tensor: str, param: Parameter, loaded: Tensor, shard: str, expert: int) -> bool:
        if stored_name(input_holder(self.name), tensor) != self._stored(shard, expert, tensor):
            raise MorphoQuantError(
                f"{self._stored(shard, expert, tensor)}: exists, but the experts of a layer share one input, which the "
                "first one holds; calibrate again"
            )
        self._copy(self._stored(shard, expert, tensor), param.data, loaded)
        self._loaded.add((tensor, expert, shard))
        return True

    def _load_gate_up(self, tensor: str, param: Parameter, loaded: Tensor, shard: str, expert: int) -> bool:
        local = self.local_expert(expert)
        if local < 0:
            return False
        gate, up = param.data[local].chunk(2, _ALONG_N[tensor])
        own = self._cut(loaded, _ALONG_N[tensor])
        self._copy(self._stored(shard, expert, tensor), gate if shard == "w1" else up, own)
        self._loaded.add((tensor, expert, shard))
        return True

    def _load_down(self, tensor: str, param: Parameter, loaded: Tensor, shard: str, expert: int) -> bool:
        local = self.local_expert(expert)
        if local < 0:
            return False
        own = self._cut(loaded, _ALONG_K[tensor]) if tensor in _ALONG_K else loaded
        self._copy(self._stored(shard, expert, tensor), param.data[local], own)
        self._loaded.add((tensor, expert, shard))
        return True

    def _cut(self, loaded: Tensor, dimension: int) -> Tensor:
        """This rank's part; the whole if it cannot be cut, whose shape is then refused."""
        size, rest = divmod(loaded.shape[dimension], self.ranks)
        return loaded if rest else loaded.narrow(dimension, self.rank * size, size)

    def _copy(self, stored: str, target: Tensor, loaded: Tensor) -> None:
        if loaded.shape != target.shape:
            raise MorphoQuantError(
                f"{stored}: has shape {list(loaded.shape)} on this rank, expected {list(target.shape)}; config.json "
                "does not belong to these weights"
            )
        target.copy_(loaded)

    def _stored(self, shard: str, expert: int, tensor: str) -> str:
        return stored_name(f"{self.name}.{expert}.{PROJECTIONS[shard]}", tensor)

    def check_loaded(self) -> None:
        """Raise MorphoQuantError naming the first tensor of this rank's experts that was not loaded."""
        outputs = OUTPUT_TENSORS[self.experts.scale_scheme]
        wanted = [(tensor, 0, "w1") for tensor in INPUT_TENSORS]
        for expert in range(self.experts.count):
            if self.local_expert(expert) >= 0:
                wanted += [(tensor, expert, shard) for shard in ("w1", "w3") for tensor in outputs]
                wanted += [(tensor, expert, "w2") for tensor in (*INPUT_TENSORS, *outputs)]
        missing = [load for load in wanted if load not in self._loaded]
        if missing:
            tensor, expert, shard = missing[0]
            raise MorphoQuantError(
                f"{self._stored(shard, expert, tensor)}: was not loaded ({len(wanted) - len(missing)} of {len(wanted)} "
                "tensors of these experts were); the checkpoint is incomplete"
            )


def _doubled(spec: TensorSpec, dimension: int) -> TensorSpec:
    """gate and up side by side."""
    shape = list(spec.shape)
    shape[dimension] *= 2
    return TensorSpec(spec.dtype, tuple(shape))


def _stacked(spec: TensorSpec, count: int) -> TensorSpec:
    return TensorSpec(spec.dtype, (count, *spec.shape))


def flattened(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of experts, absorbed_bias as [B * R, N]: vLLM 0.30 takes one of three dimensions for all experts'."""
    for name, tensor in weights:
        yield name, tensor.flatten(0, 1) if tensor.dim() == 3 else tensor


def _parameter(spec: TensorSpec, tensor: str, load: Callable[..., bool], rows: int) -> Parameter:
    """A parameter whose loader vLLM calls for each expert and projection."""

    def loader(
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
        **_: Any,
    ) -> bool | None:
        if tensor == "absorbed_bias" and loaded_weight.dim() == 2:
            loaded_weight = loaded_weight.unflatten(0, (-1, rows))
        loaded = load(tensor, param, loaded_weight, shard_id, expert_id)
        return loaded if return_success else None

    parameter = Parameter(torch.zeros(spec.shape, dtype=spec.dtype), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter
