"""Writes a checkpoint: the source's files and tensors, with the quantized layers' weights replaced."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.model.experts import find_experts
from calibration.model.source import Source
from calibration.output.card import CARD_FILE
from calibration.output.distributions import write_distributions
from calibration.output.json_file import write_json
from calibration.output.weight_file import write_weights
from calibration.output.written_files import copied_files
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.layers import stored_name
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.seal import sealed

# Loads a layer's tensor by the names of layer and tensor. Tensors must not share memory: safetensors refuses that.
LoadQuantized = Callable[[str, str], Tensor]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: its size in bytes, and the function that loads it."""

    name: str
    nbytes: int
    load: Callable[[], Tensor]


def checkpoint_size(source: Source, spec: QuantizationSpec) -> int:
    """Bytes of the new checkpoint."""
    copied = sum((source.directory / path).stat().st_size for path in copied_files(source.directory))
    return copied + tensors_size(source, spec)


def tensors_size(source: Source, spec: QuantizationSpec) -> int:
    """Bytes of the checkpoint's tensors, without the files beside them."""
    return sum(tensor.nbytes for tensor in output_tensors(source, spec, _nothing))


def quantized_size(source: Source, spec: QuantizationSpec) -> int:
    """Bytes of the checkpoint's quantized layers alone."""
    tensors = output_tensors(source, spec, _nothing)
    return sum(tensor.nbytes for tensor in tensors if tensor.name not in source.tensors)


def _nothing(layer: str, tensor: str) -> Tensor:
    raise AssertionError(f"{layer}.{tensor}: only its size was requested")


def output_tensors(source: Source, spec: QuantizationSpec, quantized: LoadQuantized) -> Iterator[OutputTensor]:
    """Every tensor of the checkpoint, in the order of the source's files.

    `quantized` gives a layer's tensor by its name in format.layers.tensor_specs, and is called when that is loaded.
    """
    layers_of = {stored_name(layer, "weight"): [layer] for layer in spec.layers}
    for experts in spec.experts:
        stored = find_experts(experts, source.tensors)
        assert stored is not None
        layers_of |= stored.tensors
    for name, info in source.tensors.items():
        if name not in layers_of:
            yield OutputTensor(name, info.nbytes, partial(source.load, name))
            continue
        for layer in layers_of[name]:
            for tensor, want in spec.stored_tensors(layer).items():
                yield OutputTensor(
                    stored_name(layer, tensor),
                    math.prod(want.shape) * want.dtype.itemsize,
                    partial(quantized, layer, tensor),
                )


def split_shards(tensors: list[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Split tensors into files of at most `limit` bytes; a larger tensor gets a separate file."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_checkpoint(
    directory: Path,
    source: Source,
    spec: QuantizationSpec,
    quantized: LoadQuantized,
    shard_size: int,
    report: Mapping[str, Any],
    distributions: Mapping[str, Mapping[str, Tensor]],
    card: str,
) -> None:
    """Write a whole checkpoint into an existing empty directory; holds one file's tensors at a time.

    `card` is the text of its README.md. The config is written last: an incomplete directory does not load.
    """
    for path in copied_files(source.directory):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.directory / path, directory / path)
    shards = split_shards(list(output_tensors(source, spec, quantized)), shard_size)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        write_weights(directory / file_name, {tensor.name: tensor.load() for tensor in shard}, {"format": "pt"})
    # Written even for a single file: the index lists every tensor, so a missing carried tensor is noticed.
    weight_map = {tensor.name: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    write_distributions(directory, distributions)
    write_json(directory / REPORT_FILE, report)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")
    config = with_query_scale(source.config)
    settings = sealed(directory, config, spec)
    write_json(directory / CONFIG_FILE, {**config, "quantization_config": settings.to_dict()})


def with_query_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the scale of late queries also where vLLM looks for it, as `llama_4_scaling`.

    transformers keeps it in Ministral 3's rope parameters. vLLM reads them, and would not scale queries after
    original_max_position_embeddings tokens.
    """
    text = config.get("text_config")
    found = {**config, "text_config": with_query_scale(text)} if isinstance(text, Mapping) else dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "llama_4_scaling_beta" in rope:
        scale = {"beta": rope["llama_4_scaling_beta"]}
        scale["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
        found.setdefault("llama_4_scaling", scale)
    return found
