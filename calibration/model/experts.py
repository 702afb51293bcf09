"""The routed experts of a decoder block in the model's files: found by name and shape, planned, read one at a time.

Files hold them expert by expert (`<name>.<e>.gate_proj.weight` [intermediate, K]), or merged and transposed as
Qwen3-VL-MoE does (`<name>.gate_up_proj` [E, K, 2 intermediate], `<name>.down_proj` [E, intermediate, K]). transformers
merges them without transposing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.model.source import Source, TensorInfo
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import ExpertsSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Keys of config.json, at any depth, that count experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Its key for the number of experts that a token chooses.
CHOSEN = "num_experts_per_tok"
SILU = ("silu", "swish")
SIXTEEN_BIT = "leave the experts in 16 bit with --ignore '*.experts.*'"


@dataclass(frozen=True)
class StoredExperts:
    """One list of experts in the files."""

    # Name of the list, e.g. "model.layers.0.mlp.experts".
    name: str
    count: int
    in_features: int
    intermediate_features: int
    # Whether one tensor holds all experts.
    merged: bool
    # Whether that tensor has input channels before outputs.
    transposed: bool = False

    def projection(self, expert: int, projection: str) -> str:
        """Name of one expert's linear in the checkpoint."""
        return f"{self.name}.{expert}.{projection}"

    def merged_shape(self, parameter: str) -> tuple[int, int, int]:
        """Shape of a parameter of transformers with all experts, by its name.

        GATE_UP is [E, 2 intermediate, K], DOWN is [E, K, intermediate].
        """
        if parameter.endswith(DOWN):
            return self.count, self.in_features, self.intermediate_features
        return self.count, 2 * self.intermediate_features, self.in_features

    @property
    def linears(self) -> list[str]:
        """Names of all linears in the checkpoint, expert by expert."""
        return [self.projection(expert, kind) for expert in range(self.count) for kind in PROJECTIONS]

    @property
    def tensors(self) -> dict[str, list[str]]:
        """Names of the tensors in the files, and of the linears in each."""
        if not self.merged:
            return {f"{linear}.weight": [linear] for linear in self.linears}
        each = range(self.count)
        return {
            f"{self.name}.{GATE_UP}": [self.projection(expert, kind) for expert in each for kind in PROJECTIONS[:2]],
            f"{self.name}.{DOWN}": [self.projection(expert, DOWN) for expert in each],
        }


def find_experts(name: str, tensors: Mapping[str, TensorInfo]) -> StoredExperts | None:
    """The list of experts `name` in the files; None if they hold no gate, up and down projections of that name.

    Raises MorphoQuantError naming a tensor that is missing or has another shape than the first expert's.
    """
    if f"{name}.{GATE_UP}" in tensors:
        return _merged(name, tensors)
    first = tensors.get(f"{name}.0.{PROJECTIONS[0]}.weight")
    if first is None or len(first.shape) != 2:
        return None
    count = 0
    while f"{name}.{count}.{PROJECTIONS[0]}.weight" in tensors:
        count += 1
    intermediate, in_features = first.shape
    found = StoredExperts(name, count, in_features, intermediate, merged=False)
    for linear in found.linears:
        shape = (in_features, intermediate) if linear.endswith(DOWN) else (intermediate, in_features)
        _check_tensor(f"{linear}.weight", shape, tensors)
    return found


def _merged(name: str, tensors: Mapping[str, TensorInfo]) -> StoredExperts:
    gate_up, down = (tensors.get(f"{name}.{kind}") for kind in (GATE_UP, DOWN))
    assert gate_up is not None
    if down is not None and len(gate_up.shape) == len(down.shape) == 3 and gate_up.shape[0] == down.shape[0]:
        count, first, second = gate_up.shape
        _, rows, columns = down.shape
        if (first, second) == (columns, 2 * rows):
            return StoredExperts(name, count, first, rows, merged=True, transposed=True)
        if (first, second) == (2 * columns, rows):
            return StoredExperts(name, count, second, columns, merged=True)
    shapes = [None if info is None else list(info.shape) for info in (gate_up, down)]
    raise MorphoQuantError(
        f"{name}: {GATE_UP} {shapes[0]} and {DOWN} {shapes[1]} are not the weights of experts with a gate; "
        "download the model again"
    )


def _check_tensor(name: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> None:
    info = tensors.get(name)
    if info is None or info.shape != shape or not info.is_float:
        state = "missing" if info is None else f"{info.dtype} {list(info.shape)}, not floats {list(shape)}"
        raise MorphoQuantError(f"{name}: {state}; download the model again")


def load_expert(source: Source, stored: StoredExperts, expert: int, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Weights of one expert by the projections `kinds`, in the dtype of the files.

    Gate and up are [intermediate, K], down is [K, intermediate].
    """
    if not stored.merged:
        return {kind: source.load(f"{stored.projection(expert, kind)}.weight") for kind in kinds}
    found: dict[str, Tensor] = {}
    for tensor, parts in ((GATE_UP, PROJECTIONS[:2]), (DOWN, (DOWN,))):
        if set(parts) & set(kinds):
            weight = source.load_part(f"{stored.name}.{tensor}", expert)
            weight = weight.T if stored.transposed else weight
            found |= dict(zip(parts, weight.chunk(len(parts)), strict=True))
    return {kind: found[kind].contiguous() for kind in kinds}


def load_merged(
    source: Source, stored: StoredExperts, parameter: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """All experts' weights of one of transformers' parameters; see StoredExperts.merged_shape."""
    merged = torch.empty(stored.merged_shape(parameter), device=device, dtype=dtype)
    for expert, place in enumerate(merged):
        kinds = (DOWN,) if parameter.endswith(DOWN) else PROJECTIONS[:2]
        torch.cat(
            [weight.to(device, dtype) for weight in load_expert(source, stored, expert, kinds).values()], out=place
        )
    return merged


def merged_parameter(name: str) -> str | None:
    """The list of experts of a block's parameter that transformers merges, by the parameter's name; else None."""
    parent, _, kind = name.rpartition(".")
    return parent if kind in (GATE_UP, DOWN) else None


def check_served(
    experts: StoredExperts, tensors: Mapping[str, TensorInfo], decoder_config: Mapping[str, object]
) -> None:
    """Refuse experts that the integer experts do not compute: those with another activation, or with biases."""
    activation = decoder_config.get("hidden_act", SILU[0])
    problem = None if activation in SILU else f"their activation is {activation!r}, not silu"
    biases = [*(f"{linear}.bias" for linear in experts.linears), *(f"{name}_bias" for name in experts.tensors)]
    bias = next((name for name in biases if name in tensors), None)
    if bias is not None:
        problem = f"{bias} is a bias"
    if problem:
        raise MorphoQuantError(
            f"{experts.name}: experts of this kind are not served in 4 bit ({problem}); {SIXTEEN_BIT}"
        )


def plan_experts(
    stored: Iterable[StoredExperts],
    chosen: Collection[str],
    tensors: Mapping[str, TensorInfo],
    decoder_config: Mapping[str, Any],
    recipe: Recipe,
) -> dict[str, ExpertsSpec]:
    """Settings of the lists of experts that are quantized; those of a block are quantized together or not at all."""
    found = {}
    for experts in stored:
        missing = [linear for linear in experts.linears if linear not in chosen]
        if len(missing) == len(experts.linears):
            continue
        if missing:
            raise MorphoQuantError(
                f"{experts.name}: its experts are quantized together or not at all, but targets and ignore leave out "
                f"{missing[0]}; name all of '{experts.name}.*', or none"
            )
        check_served(experts, tensors, decoder_config)
        found[experts.name] = ExpertsSpec(
            count=experts.count,
            in_features=experts.in_features,
            intermediate_features=experts.intermediate_features,
            group_size=recipe.group_size,
            scale_scheme=recipe.scale_scheme,
        )
    return found


def counts_experts(config: Mapping[str, object]) -> bool:
    """Whether a config.json describes a mixture of experts."""
    return any(isinstance(count := config.get(key), int) and count > 0 for key in _COUNTS) or any(
        counts_experts(value) for value in config.values() if isinstance(value, Mapping)
    )
