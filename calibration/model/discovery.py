"""The generic path: finds the decoder of an architecture that is not listed, in transformers' model without weights.

Nothing here is known of the architecture. The decoder is the longest list of blocks below the language model. One
forward pass on the meta device shows which linears read the same tensor, in which order they run, and what a block
returns. transformers' plan of tensor parallelism tells columns from rows, or else the order does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from calibration.model.architectures import Architecture, SharedInput, check_counts, known_architecture
from calibration.model.buffers import compute_buffers
from calibration.model.experts import SIXTEEN_BIT, counts_experts
from calibration.model.fp8 import without_quantization
from calibration.model.loading import decoder_sizes, empty_model
from calibration.model.plan import matches
from calibration.model.refusals import SCORES_TEXT
from calibration.model.source import Source, TensorInfo
from calibration.model.tracing import TOKENS, Run, fix_angles, linears, run_blocks
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError

# How the report and `inspect` mark a checkpoint that this module's architecture made.
GENERIC = "generic path, not verified for this architecture"
# vLLM's names of fused layers whose parts are named so; other inputs are named after their linears.
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
_MEDIA = ("image", "video", "audio")
_NEEDED_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")


def choose_architecture(source: Source, recipe: Recipe) -> Architecture:
    """The verified architecture of the source model, or the one that `discover` finds in it.

    A verified architecture is that of a model that writes text, so models that score one are discovered.
    Raises MorphoQuantError as `discover`.
    """
    known = known_architecture(source.config)
    # A listed dense type whose config counts experts is another model than the listed one.
    listed = known is not None and (bool(known.experts) or not counts_experts(source.config))
    scores = any(str(name).endswith(SCORES_TEXT) for name in source.config.get("architectures") or ())
    if known is None or not listed or recipe.decoder or scores:
        return discover(source, recipe)
    return _with_sizes(known, source)


def _with_sizes(known: Architecture, source: Source) -> Architecture:
    """A listed architecture with the sizes that config.json leaves to the defaults of transformers' class."""
    written = known.written_config(source.config)
    if all(name in written for name in _NEEDED_SIZES):
        return known
    check_counts(written, optional=_NEEDED_SIZES)
    return replace(known, sizes={**decoder_sizes(known, source), **written})


def discover(source: Source, recipe: Recipe) -> Architecture:
    """The architecture of a source model, by its structure alone.

    Raises MorphoQuantError naming the module and the remedy if transformers cannot build the model without remote
    code. It also does if the decoder is ambiguous, or if its blocks are not a chain of linears. The same error names
    routed experts, unless the recipe leaves them in 16 bit.
    """
    found, model, blocks = _decoder_of(source, recipe)
    block_module = found.block_module
    _refuse_other_structures(model, blocks, block_module)
    lists = [_skip_experts(block, f"{block_module}.{index}", recipe) for index, block in enumerate(blocks)]
    if counts_experts(source.config) and not any(lists):
        raise MorphoQuantError(
            f"config.json: model_type '{source.config.get('model_type')}' is a mixture of experts, but no module of "
            f"{type(model).__name__} is called experts; this model is not supported"
        )
    run = run_blocks(model, blocks, block_module)
    _refuse_changes_between(run, block_module)
    shared_inputs = _shared_inputs(run, block_module, getattr(model, "tp_plan", None) or {})
    prefix = _stored_prefix(block_module, len(blocks), shared_inputs, source.tensors)
    return replace(found, block_prefixes=(prefix,), shared_inputs=shared_inputs, tuple_output=run.tuple_output)


def architecture_of_form(config: Mapping[str, Any], directory: Path) -> Architecture:
    """The architecture of a model in any form, 16-bit or a checkpoint, without the names in its files.

    Raises MorphoQuantError if transformers cannot build the model, or if its decoder is ambiguous.
    """
    plain = Source(directory, without_quantization(config), {})
    known = known_architecture(config)
    return _decoder_of(plain, Recipe())[0] if known is None else _with_sizes(known, plain)


def _decoder_of(source: Source, recipe: Recipe) -> tuple[Architecture, Any, list[nn.Module]]:
    """What config.json alone tells of an unlisted architecture; the model without weights, and its blocks."""
    config = source.config
    name, remote_code = _class_name(config, trust_remote_code=recipe.trust_remote_code)
    found = Architecture(str(config.get("model_type")), name, "", (), verified=False, remote_code=remote_code)
    model = empty_model(found, source, recipe)
    fix_angles(model)
    block_module = _block_list(model, recipe.decoder)
    blocks = list(model.get_submodule(block_module).children())
    media = tuple(row for row in _MEDIA if any(f"{row}_token_{kind}" in config for kind in ("id", "index")))
    return replace(found, block_module=block_module, media=media, sizes=_sizes(model, blocks)), model, blocks


def _refuse_other_structures(model: Any, blocks: Sequence[nn.Module], block_module: str) -> None:
    """Refuse decoders that read an encoder's states, and blocks that the files do not hold whole."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise MorphoQuantError(
            f"{type(model).__name__}: is an encoder-decoder, whose cross-attention is not supported; take a decoder"
        )
    for index, block in enumerate(blocks):
        for name in compute_buffers(model, copy.deepcopy(block)):
            raise MorphoQuantError(
                f"{block_module}.{index}.{name}: a buffer that weight files do not hold and transformers does not "
                "compute again, so blocks cannot be loaded one at a time; this model is not supported"
            )


def _skip_experts(block: nn.Module, block_name: str, recipe: Recipe) -> list[str]:
    """Let the routed experts of a block return zeros, since routing needs values; the names of their modules.

    Raises MorphoQuantError if the recipe does not leave them in 16 bit.
    """
    found = {name: module for name, module in block.named_modules() if name.rpartition(".")[2] == "experts"}
    for name, module in found.items():
        if not matches(f"{block_name}.{name}.0.gate_proj", recipe.ignore):
            raise MorphoQuantError(
                f"{block_name}.{name}: a mixture of experts of a kind that is not known in 4 bit; {SIXTEEN_BIT}"
            )
        # An attribute of the instance hides the class's method.
        module.forward = lambda hidden, *others, **named: torch.zeros_like(hidden)
    return list(found)


def _class_name(config: Mapping[str, Any], *, trust_remote_code: bool) -> tuple[str, str]:
    """The class of transformers that config.json names; or one of the model's directory, with its place there."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if not isinstance(getattr(transformers, name, None), type):
        # A reward model's head may be remote code, which calibration does not need: it copies the head's tensors.
        base = next((name.removesuffix(ending) for ending in SCORES_TEXT if name.endswith(ending)), None)
        name = name if base is None else f"{base}Model"
    if isinstance(getattr(transformers, name, None), type):
        return name, ""
    if "auto_map" in config:
        remote = config["auto_map"].get("AutoModelForCausalLM") if isinstance(config["auto_map"], Mapping) else None
        if trust_remote_code and isinstance(remote, str):
            return name, remote
        raise MorphoQuantError(
            f"config.json: {name or 'the model'} is code in the model's directory (auto_map), which runs only with "
            "--trust-remote-code, and only as AutoModelForCausalLM; or use a version that transformers builds itself"
        )
    raise MorphoQuantError(
        f"config.json: model_type {config.get('model_type')!r} is not supported: transformers "
        f"{transformers.__version__} has no class {name!r}, which 'architectures' names; upgrade transformers"
    )


def _block_list(model: Any, wanted: str) -> str:
    """Name of the list of decoder blocks: the one that is `wanted`, or else the longest below the language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    start = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = _lists_with_linears(model)
    if wanted:
        if wanted not in lists:
            known = ", ".join(sorted(lists)) or "none"
            raise MorphoQuantError(f"--decoder: {wanted} is not a list of blocks with linears; the model has: {known}")
        return wanted
    below = {name: size for name, size in lists.items() if not start or name.startswith(f"{start}.")}
    longest = [name for name, size in below.items() if size == max(below.values())]
    if not longest:
        raise MorphoQuantError(
            f"{type(model).__name__}: no list of blocks with linears (torch.nn.Linear) below its language model, so "
            "nothing can be quantized"
        )
    if len(longest) > 1:
        raise MorphoQuantError(
            f"{type(model).__name__}: {' and '.join(longest)} are lists of {below[longest[0]]} blocks each; name the "
            f"decoder by --decoder {longest[0]}"
        )
    return longest[0]


def _lists_with_linears(model: nn.Module) -> dict[str, int]:
    """Lengths of the lists of modules that hold linears, by name; lists inside other lists are left out."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and all(linears(block) for block in module):
            lists[name] = len(module)
    return {name: size for name, size in lists.items() if size}


def _refuse_changes_between(run: Run, block_module: str) -> None:
    """Blocks are run one at a time, so each must get what the one before returned, and nothing else."""
    shared = [name for name, mapping in run.left.items() if mapping.was_read]
    if shared:
        raise MorphoQuantError(
            f"{block_module}: later blocks read {shared[0]} of earlier ones, as keys and values that blocks share, "
            "which the generic path does not follow; this model is not supported"
        )
    if len(run.given) != len(run.inputs):
        raise MorphoQuantError(
            f"{block_module}: {len(run.given)} of {len(run.inputs)} blocks ran in one pass; this model is not supported"
        )
    for index, (given, before) in enumerate(zip(run.given[1:], run.returned, strict=False), start=1):
        if given is not before:
            raise MorphoQuantError(
                f"{block_module}.{index}: the model changes the hidden states between blocks, which the generic path "
                "does not follow; this model is not supported"
            )


def _shared_inputs(run: Run, block_module: str, tp_plan: Mapping[str, str]) -> tuple[SharedInput, ...]:
    """The inputs of all blocks, in the order in which they are computed; those that some blocks lack are optional."""
    groups: dict[tuple[str, ...], int] = {}
    for inputs in run.inputs:
        for group in _groups(inputs):
            groups[group] = groups.get(group, 0) + 1
    owner: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for name in group:
            if owner.setdefault(name, group) != group:
                raise MorphoQuantError(
                    f"{block_module}.*.{name}: shares its input with other linears in some blocks than in others; "
                    "this model is not supported"
                )
    if not groups:
        raise MorphoQuantError(f"{block_module}: no linear of its blocks ran; this model is not supported")
    order = _first_seen(run.inputs)
    return tuple(
        SharedInput(
            _input_name(group),
            group,
            _parallel(group, list(groups), block_module, tp_plan),
            optional=groups[group] < len(run.inputs),
        )
        for group in sorted(groups, key=lambda group: order[group[0]])
    )


def _first_seen(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, int]:
    names = dict.fromkeys(name for block in inputs for name in block)
    return {name: place for place, name in enumerate(names)}


def _groups(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The linears of one block by the tensor that they read and by the module that holds them.

    vLLM fuses linears of one module only: a parallel attention block reads one tensor in its attention and its MLP.
    Linears that read something else than one vector for each token are left out.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name, x in inputs.items():
        if x.numel() == TOKENS * x.shape[-1]:
            groups.setdefault((id(x), name.rpartition(".")[0]), []).append(name)
    return [tuple(names) for names in groups.values()]


def _input_name(group: tuple[str, ...]) -> str:
    if len(group) == 1:
        return group[0]
    parent = group[0].rpartition(".")[0]
    parts = tuple(name.rpartition(".")[2] for name in group)
    return ".".join(filter(None, (parent, _FUSED.get(parts, "_".join(parts)))))


def _parallel(
    group: tuple[str, ...], groups: Sequence[tuple[str, ...]], block_module: str, tp_plan: Mapping[str, str]
) -> str:
    """Direction in which tensor parallelism splits the linears of one input."""
    for pattern, style in tp_plan.items():
        if f"{block_module}.*.{group[0]}".endswith(pattern) and style.startswith(("col", "row")):
            return "row" if style.startswith("row") else "column"
    # Without a plan: the first linears of a module widen its input, the later ones read what those computed.
    parent = group[0].rpartition(".")[0]
    first = next(other for other in groups if other[0].rpartition(".")[0] == parent)
    return "column" if group == first else "row"


def _stored_prefix(
    block_module: str, blocks: int, shared_inputs: Sequence[SharedInput], tensors: Mapping[str, TensorInfo]
) -> str:
    """Name of the list of blocks in the weight files, by the linears that they hold."""
    linear = next(shared for shared in shared_inputs if not shared.optional).shards[0]
    ending = f".0.{linear}.weight"
    prefixes = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    whole = [prefix for prefix in prefixes if f"{prefix}.{blocks - 1}.{linear}.weight" in tensors]
    if block_module in whole:
        return block_module
    if len(whole) == 1:
        return whole[0]
    if not whole:
        raise MorphoQuantError(
            f"{block_module}.0.{linear}.weight: missing; the weights are stored under other names than transformers' "
            "model has, or do not fit config.json"
        )
    raise MorphoQuantError(
        f"{block_module}: the weights hold {' and '.join(whole)}, and either may be this list; this model is not "
        "supported"
    )


def _sizes(model: Any, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """The decoder's sizes under Llama's names, as transformers reads them from the config."""
    config = model.config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return {**sizes, "num_hidden_layers": len(blocks)}
