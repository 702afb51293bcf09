"""Plans which linears are quantized and how: makes the quantization_config from patterns and sizes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from calibration.model.architectures import Architecture, SharedInput, Tower
from calibration.model.experts import StoredExperts, find_experts, plan_experts
from calibration.model.ranks import check_heads, largest_tensor_parallel
from calibration.model.source import TensorInfo
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import BIAS_DTYPES, LAYER_TENSORS, owner_of
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.limits import GROUP_SIZES


@dataclass(frozen=True)
class DecoderNames:
    """Names of the layers of the decoder, or of a tower, in the weight files: `prefix.<block>.<linear>`."""

    prefix: str
    blocks: int

    def block(self, block: int) -> str:
        """Name of a block in the files."""
        return f"{self.prefix}.{block}"

    def layer(self, block: int, linear: str) -> str:
        """Name of a linear, or of a fused input, in the files."""
        return f"{self.prefix}.{block}.{linear}"


def decoder_names(
    architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> DecoderNames:
    """Find the decoder's prefix in the files; MorphoQuantError naming the first linear that is missing there."""
    blocks = architecture.decoder_config(config)["num_hidden_layers"]
    shards = [shard for shared in architecture.shared_inputs if not shared.optional for shard in shared.shards]
    prefixes = architecture.block_prefixes
    prefix = next((p for p in prefixes if f"{p}.0.{shards[0]}.weight" in tensors), prefixes[0])
    names = DecoderNames(prefix, blocks)
    _check_linears(names, shards, tensors, architecture.model_type)
    return names


def tower_names(tower: Tower, tensors: Mapping[str, TensorInfo]) -> DecoderNames:
    """Find a tower's prefix and the number of its blocks in the files; MorphoQuantError if a linear is missing."""
    shards = [shard for shared in tower.shared_inputs for shard in shared.shards]
    for prefix in tower.block_prefixes:
        blocks = 0
        while f"{prefix}.{blocks}.{shards[0]}.weight" in tensors:
            blocks += 1
        if blocks:
            names = DecoderNames(prefix, blocks)
            _check_linears(names, shards, tensors, f"{tower.name} tower")
            return names
    raise MorphoQuantError(
        f"towers: the weights hold no {tower.block_prefixes[0]}.0.{shards[0]}, so no {tower.name} tower; leave it out"
    )


def _check_linears(names: DecoderNames, shards: Sequence[str], tensors: Mapping[str, TensorInfo], model: str) -> None:
    for block in range(names.blocks):
        for shard in shards:
            name = f"{names.layer(block, shard)}.weight"
            info = tensors.get(name)
            if info is None or len(info.shape) != 2 or not info.is_float:
                state = "missing" if info is None else f"{info.dtype} {list(info.shape)}, not a float matrix"
                raise MorphoQuantError(
                    f"{name}: {state}; the weights do not fit config.json ({model}, {names.blocks} blocks)"
                )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer name matches any pattern: fnmatch, or a full regular expression after `re:`."""
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise MorphoQuantError(f"pattern '{pattern}' is not a regular expression ({error}); correct it") from error


def plan(
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    recipe: Recipe,
    created_by: str = "",
) -> QuantizationSpec:
    """The quantization_config of the new checkpoint, checked against every rule of the format.

    Linears whose K no group size divides stay in 16 bit: `sixteen_bit` names them. Raises MorphoQuantError naming the
    pattern, layer or fused group if targets match nothing, reach outside the decoder or split a fused group. The same
    error names a layer if K is not divisible by the group size or tensor_parallel breaks a group. It names a requested
    tower if the model lacks it or no layer of it would be quantized.
    """
    names = decoder_names(architecture, config, tensors)
    stored = stored_experts(architecture, names, tensors)
    chosen = _choose(names, architecture.shared_inputs, stored, tensors, recipe)
    chosen -= sixteen_bit(architecture, names, tensors).keys()
    if not chosen:
        raise MorphoQuantError(
            f"{names.prefix}: no linear is left to quantize: none of {list(GROUP_SIZES)} divides their K"
        )
    layers = _layers(names, architecture.shared_inputs, tensors, chosen, recipe)
    for tower in recipe.towers:
        layers |= tower_layers(architecture.tower(tower), tensors, recipe)
    decoder_config = architecture.decoder_config(config)
    experts = plan_experts(stored.values(), chosen, tensors, decoder_config, recipe)
    for name, layer in layers.items():
        layer.check(name)
    for name, settings in experts.items():
        settings.check(name)
    size = recipe.tensor_parallel
    if not isinstance(size, int):
        size = largest_tensor_parallel(layers, experts, decoder_config)
    spec = QuantizationSpec(
        layers=layers,
        experts=experts,
        tensor_parallel=size,
        placeholder_token_ids=architecture.placeholder_token_ids(config),
        created_by=created_by,
    )
    check_heads(size, decoder_config)
    return spec


def check_carried(tensors: Mapping[str, TensorInfo], spec: QuantizationSpec) -> None:
    """Refuse tensors of a source that a checkpoint with these settings could not hold beside its quantized layers."""
    for name, info in tensors.items():
        owner, last = owner_of(name, spec.linears), name.rpartition(".")[2]
        if owner is None and last not in LAYER_TENSORS:
            continue
        below = name.removeprefix(f"{owner}.")
        if owner is None or below not in ("weight", "bias"):
            raise MorphoQuantError(
                f"{info.file}: {name} has a name that means something else in a checkpoint; remove the tensor from the "
                "model, or leave its linear in 16 bit with --ignore"
            )
        if below == "bias" and info.dtype not in BIAS_DTYPES:
            raise MorphoQuantError(
                f"{info.file}: {name} has the dtype {info.dtype}; store it as one of {', '.join(BIAS_DTYPES)}, or "
                "leave its linear in 16 bit with --ignore"
            )


def sixteen_bit(architecture: Architecture, names: DecoderNames, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """K by name of the decoder's linears that stay in 16 bit, because no group size divides their K."""
    shapes = {
        name: tensors[f"{name}.weight"].shape for name in _decoder_linears(names, architecture.shared_inputs, tensors)
    }
    found = {name: shape[1] for name, shape in shapes.items()}
    for experts in stored_experts(architecture, names, tensors).values():
        # All experts of a layer are quantized, or none.
        sizes = (experts.in_features, experts.intermediate_features)
        unfit = next((k for k in sizes if all(k % size for size in GROUP_SIZES)), None)
        if unfit is not None:
            found |= dict.fromkeys(experts.linears, unfit)
    return {name: k for name, k in found.items() if all(k % size for size in GROUP_SIZES)}


def stored_experts(
    architecture: Architecture, names: DecoderNames, tensors: Mapping[str, TensorInfo]
) -> dict[int, StoredExperts]:
    """The routed experts of each block that has some, by block; MorphoQuantError if one lacks a tensor."""
    if not architecture.experts:
        return {}
    found = {block: find_experts(names.layer(block, architecture.experts), tensors) for block in range(names.blocks)}
    return {block: experts for block, experts in found.items() if experts is not None}


def _decoder_linears(
    names: DecoderNames, shared_inputs: Sequence[SharedInput], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Names of the linears of all blocks; optional ones of those blocks that have them."""
    return [
        names.layer(block, shard)
        for block in range(names.blocks)
        for shared in shared_inputs
        for shard in shared.shards
        if not shared.optional or f"{names.layer(block, shard)}.weight" in tensors
    ]


def tower_layers(tower: Tower, tensors: Mapping[str, TensorInfo], recipe: Recipe) -> dict[str, LayerSpec]:
    """Settings of a tower's linears, except those that `ignore` matches and those of `unfit_linears`."""
    names = tower_names(tower, tensors)
    unfit = unfit_linears(tower, tensors, recipe.group_size)
    chosen = {
        name
        for block in range(names.blocks)
        for shared in tower.shared_inputs
        if shared.name not in unfit
        for name in (names.layer(block, shard) for shard in shared.shards)
        if not matches(name, recipe.ignore)
    }
    if not chosen:
        raise MorphoQuantError(
            f"towers: no linear of the {tower.name} tower is left to quantize: K must be divisible by group_size "
            f"{recipe.group_size}, and 'ignore' must not match; leave the tower out"
        )
    return _layers(names, tower.shared_inputs, tensors, chosen, recipe, fixed_row=tower.name)


def unfit_linears(tower: Tower, tensors: Mapping[str, TensorInfo], group_size: int) -> dict[str, int]:
    """K by name of a tower's block inputs that stay in 16 bit because group_size does not divide K.

    An example is K = 3420 in mlp.down_proj of Qwen2.5-Omni and the small Qwen2.5-VLs.
    """
    names = tower_names(tower, tensors)
    sizes = {shared.name: tensors[f"{names.layer(0, shared.shards[0])}.weight"].shape for shared in tower.shared_inputs}
    return {name: shape[1] for name, shape in sizes.items() if shape[1] % group_size}


def _choose(
    names: DecoderNames,
    shared_inputs: Sequence[SharedInput],
    stored: Mapping[int, StoredExperts],
    tensors: Mapping[str, TensorInfo],
    recipe: Recipe,
) -> set[str]:
    """The decoder linears that the recipe's patterns select, experts' included."""
    of_experts = {linear for experts in stored.values() for linear in experts.linears}
    merged = {name for experts in stored.values() for name in experts.tensors}
    decoder = {*_decoder_linears(names, shared_inputs, tensors), *of_experts}
    # Every name that a pattern may match: all stored weight matrices, including embeddings and towers. Experts of
    # another kind may be one tensor, whose name has no ending.
    matrices = of_experts | {
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name not in merged and (len(info.shape) > 2 or (name.endswith(".weight") and len(info.shape) == 2))
    }
    for setting, patterns in (("targets", recipe.targets or ()), ("ignore", recipe.ignore)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in matrices):
                raise MorphoQuantError(
                    f"{setting}: '{pattern}' matches no layer of the model; names look like {min(decoder)}"
                )
    wanted = decoder if recipe.targets is None else {name for name in matrices if matches(name, recipe.targets)}
    chosen = {name for name in wanted if not matches(name, recipe.ignore)}
    outside = chosen - decoder
    if outside:
        raise MorphoQuantError(
            f"targets: {min(outside)} is outside the language model's decoder ({names.prefix}.*), and targets "
            "are decoder linears: narrow the pattern; an image tower is quantized by towers: image"
        )
    if not chosen:
        raise MorphoQuantError("targets: no layer is left to quantize after 'ignore'; narrow 'ignore'")
    return chosen


def _layers(
    names: DecoderNames,
    shared_inputs: Sequence[SharedInput],
    tensors: Mapping[str, TensorInfo],
    chosen: set[str],
    recipe: Recipe,
    fixed_row: str = "",
) -> dict[str, LayerSpec]:
    """Settings of the chosen linears of all blocks, in the order of the blocks."""
    layers = {}
    for block in range(names.blocks):
        for shared in shared_inputs:
            for shard in _whole_group(names, block, shared, chosen):
                out_features, in_features = tensors[f"{shard}.weight"].shape
                layers[shard] = LayerSpec(
                    in_features=in_features,
                    out_features=out_features,
                    group_size=recipe.group_size,
                    parallel=shared.parallel,
                    shared_input=names.layer(block, shared.name),
                    bias=f"{shard}.bias" in tensors,
                    scale_scheme=recipe.scale_scheme,
                    fixed_row=fixed_row,
                )
    return layers


def _whole_group(names: DecoderNames, block: int, shared: SharedInput, chosen: set[str]) -> list[str]:
    """The chosen shards of one shared input: all of them or none."""
    shards = [names.layer(block, shard) for shard in shared.shards]
    missing = [shard for shard in shards if shard not in chosen]
    if missing and len(missing) < len(shards):
        raise MorphoQuantError(
            f"{names.layer(block, shared.name)}: its shards share one input and are quantized together or not at all, "
            f"but targets and ignore leave out {', '.join(missing)}; name all of {', '.join(shards)}, or none"
        )
    return [] if missing else shards
