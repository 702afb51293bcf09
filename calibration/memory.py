"""How much memory a calibration takes at its peak, from sizes alone, and whether it fits. Pure.

The formula of docs/calibration.md. M tokens of all samples, T sampled tokens, K in, N out, G group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from calibration.architectures import Architecture
from calibration.plan import DecoderNames
from calibration.recipe import Recipe
from calibration.source import TensorInfo
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.schema import LayerSpec, QuantizationSpec

# Python with torch, transformers and a processor, before any model.
BASE = 1 << 30
# float32 matrices [K, K] that rounding one input's weights takes at once (moments, their factors, their inverse).
SQUARES = 6
# float32 matrices [N, K] (weights, weights for the codes, what is left to round, their codes).
MATRICES = 6
# float32 copies [T, K] of an input's sampled tokens: as they are, as they should be, and a modality's share of them.
COPIES = 3


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at the peak of each phase, beside the hidden states."""

    # Embeddings and towers, with the towers' weights in memory, and read module by module.
    front: int
    front_streamed: int
    # The largest block, with one of its inputs being quantized.
    block: int


def memory_need(
    architecture: Architecture,
    tensors: Mapping[str, TensorInfo],
    names: DecoderNames,
    spec: QuantizationSpec,
    recipe: Recipe,
    sampled_tokens: int,
) -> MemoryNeed:
    """The peaks of a calibration of so many sampled tokens."""
    width = getattr(torch, recipe.dtype).itemsize

    def nbytes(infos: Iterable[TensorInfo]) -> int:
        return sum(info.elements for info in infos) * width

    own = {name: info for name, info in tensors.items() if name.startswith(architecture.model_prefix)}
    towers = [info for name, info in own.items() if name.startswith(architecture.tower_prefixes)]
    head = f"{architecture.model_prefix}lm_head.weight"
    rest = [
        info
        for name, info in own.items()
        if not name.startswith((*architecture.tower_prefixes, f"{names.prefix}.")) and name != head
    ]
    largest = max((info.elements for info in towers), default=0) * width
    blocks = [
        _block(
            [info for name, info in own.items() if name.startswith(f"{names.prefix}.{index}.")],
            [layer for name, layer in spec.layers.items() if name.startswith(f"{names.prefix}.{index}.")],
            width,
            sampled_tokens,
        )
        for index in range(names.blocks)
    ]
    return MemoryNeed(
        front=BASE + nbytes(rest) + nbytes(towers),
        front_streamed=BASE + nbytes(rest) + 2 * largest,
        block=BASE + max(blocks),
    )


def _block(infos: Iterable[TensorInfo], layers: Iterable[LayerSpec], width: int, tokens: int) -> int:
    """One block: its weights, those it is served with in float32, and the most that one of its inputs takes."""
    inputs: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        inputs.setdefault(layer.shared_input, []).append(layer)
    weights = sum(info.elements for info in infos) * width
    served = sum(layer.in_features * layer.out_features for shards in inputs.values() for layer in shards) * 4
    peaks = [0]
    waiting = [shards[0].in_features for shards in inputs.values()]
    for shards in inputs.values():
        k, n = shards[0].in_features, sum(layer.out_features for layer in shards)
        # The inputs of later linears, as the 16-bit model has them, wait for their turn.
        waiting.remove(k)
        sampled = 4 * tokens * (sum(waiting) + COPIES * k) + tokens * k
        peaks.append(sampled + 4 * SQUARES * k * k + 4 * MATRICES * n * k)
    return weights + served + max(peaks)


def check_budget(need: MemoryNeed, budget: int, model: object) -> None:
    """MorphoQuantError with the sizes where a stated budget is too small, whatever is kept on disk."""
    for what, nbytes in (("its embeddings and one tower layer", need.front_streamed), ("a decoder block", need.block)):
        if nbytes > budget:
            raise MorphoQuantError(
                f"{model}: does not fit --memory-budget {_gib(budget)}: {what} and what calibration makes of it take "
                f"{_gib(nbytes)}; raise the budget, lower --sample-tokens, or pass --dtype bfloat16"
            )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}GiB"
