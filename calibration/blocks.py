"""The loop over the decoder: each block is observed on every sample, quantized, and its outputs feed the next."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.collect import InputCollector, run_observed
from calibration.layer import QuantizedLayer, quantize_input
from calibration.model import BlockInput
from calibration.plan import DecoderNames
from calibration.recipe import Recipe
from calibration.sampling import TokenSample
from calibration.source import Source
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.schema import QuantizationSpec


@dataclass(frozen=True)
class BlockResult:
    """One finished block; `loss` is the mean output error of its layers (None where none is quantized)."""

    index: int
    count: int
    layers: dict[str, QuantizedLayer]
    loss: float | None


@torch.no_grad()
def calibrate_blocks(
    blocks: MutableSequence[nn.Module],
    inputs: Sequence[BlockInput],
    tokens: TokenSample,
    *,
    architecture: Architecture,
    names: DecoderNames,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
) -> Iterator[BlockResult]:
    """Yield the quantized layers of one block after the other.

    Each block sees the outputs of the 16-bit blocks before it. `blocks` and `inputs` are used up: a finished block
    is dropped, and the hidden states are those before the next.
    """
    for index in range(len(blocks)):
        shards_of = {
            shared.shards: [names.layer(index, shard) for shard in shared.shards]
            for shared in architecture.shared_inputs
            if names.layer(index, shared.shards[0]) in spec.layers
        }
        # Shards read the same input: it is enough to watch the first.
        collectors = {shards[0]: InputCollector(layers[0]) for shards, layers in shards_of.items()}
        device = next(blocks[index].parameters()).device
        for entry in inputs:
            output = run_observed(
                blocks[index],
                entry.hidden.to(device),
                entry.arguments[index],
                collectors,
                entry.modality.to(device),
                entry.positions.to(device),
            )
            entry.hidden = output.cpu()
            entry.arguments[index] = {}
        blocks[index] = nn.Identity()
        finished: dict[str, QuantizedLayer] = {}
        for shards, layers in shards_of.items():
            weights = {layer: _load_weight(source, layer) for layer in layers}
            finished |= quantize_input(collectors.pop(shards[0]).observation(), tokens, weights, spec, recipe)
        errors = [layer.record.output_error for layer in finished.values()]
        yield BlockResult(index, len(blocks), finished, sum(errors) / len(errors) if errors else None)


def _load_weight(source: Source, layer: str) -> Tensor:
    weight = source.load(f"{layer}.weight")
    if not bool(torch.isfinite(weight).all()):
        raise MorphoQuantError(f"{layer}.weight: holds NaN or infinite values; the source model is damaged")
    return weight
