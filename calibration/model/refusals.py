"""Faults of a model directory that are seen before any work: leftovers in config.json, other heads, other names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calibration.model.architectures import Architecture
from morphoquant_vllm.errors import MorphoQuantError

# The config of an adapter, as PEFT names it.
ADAPTER_FILE = "adapter_config.json"
# Endings of the classes that are calibrated: those that write text, and those that score one. Others have no head.
WRITES_TEXT = ("ForCausalLM", "ForConditionalGeneration", "OmniModel", "LMHeadModel")
SCORES_TEXT = ("ForSequenceClassification", "ForRewardModel", "ForProcessRewardModel")
# If one is false or null, transformers lets every token of a decoder see the later ones. Towers have such a field, too.
_CAUSAL = ("is_causal", "text_config.is_causal", "thinker_config.text_config.is_causal")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse an infinite number, an empty quantization_config, attention to later tokens, or a head of another kind."""
    for path, value in _values(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise MorphoQuantError(
                f"config.json: {path} is no finite number, which JSON cannot hold; correct it, or download it again"
            )
        if path.rpartition(".")[2] == "quantization_config" and value is not None and not value:
            raise MorphoQuantError(
                f"config.json: {path} is empty, left by another tool; remove it if the weights are in 16 bit"
            )
        if path in _CAUSAL and not value:
            raise MorphoQuantError(
                f"config.json: {path} is not true: some of vLLM's models then let tokens see later ones and others do "
                "not, so the served model may not be the calibrated one; give a model with causal attention"
            )
    classes = config.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if isinstance(name, str) and not name.endswith((*WRITES_TEXT, *SCORES_TEXT)):
            raise MorphoQuantError(
                f"config.json: {name} is not supported: it has another head, or none; only models that write text or "
                f"score one (...{', ...'.join(SCORES_TEXT)}) are calibrated"
            )


def check_one_model(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse a directory from which transformers would read other weights than those of the model itself."""
    if (directory / ADAPTER_FILE).exists():
        raise MorphoQuantError(
            f"{directory / ADAPTER_FILE}: transformers would add this adapter to the model; merge it first "
            "(examples/merge_lora.py), or remove the file"
        )
    for path, value in _values(config):
        if path.rpartition(".")[2] == "transformers_weights" and value is not None:
            raise MorphoQuantError(
                f"{directory / 'config.json'}: {path} names another weight file; remove it, and name the files as "
                "transformers does"
            )


def _values(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value nested in a JSON object, with the keys that lead to it."""
    if path:
        yield path, part
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(part, Mapping):
        items = part.items()
    elif isinstance(part, list):
        items = enumerate(part)
    for key, value in items:
        yield from _values(value, f"{path}.{key}" if path else str(key))


def check_weight_names(architecture: Architecture, tensors: Iterable[str]) -> None:
    """Refuse weights whose decoder blocks have another prefix than the published ones, and name both."""
    linear = next(shared for shared in architecture.shared_inputs if not shared.optional).shards[0]
    first = re.compile(rf"(?:(.*)\.)?0\.{re.escape(linear)}(?:\.base_layer)?\.weight")
    found = [match[1] or "" for name in tensors if (match := first.fullmatch(name))]
    # Towers have blocks, too; their names are those of a decoder only if no decoder is there.
    if not found or any(prefix in architecture.block_prefixes for prefix in found):
        return
    wanted = architecture.block_prefixes[0]
    near = min(found, key=lambda prefix: (prefix.rpartition(".")[2] != wanted.rpartition(".")[2], len(prefix)))
    raise MorphoQuantError(
        f"the weights name the decoder's blocks '{near}.0', not '{wanted}.0': they were saved from a part of the model "
        f"or inside a wrapper; load the whole model in transformers and save it with save_pretrained"
    )
