"""Computes a calibration's peak memory from sizes alone, and checks that it fits. Pure.

The formula of docs/design/streaming.md. M tokens of all samples, T drawn tokens, K in, N out, G group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from calibration.model.architectures import Architecture
from calibration.model.head_tensor import head_tensor, stored_head
from calibration.model.plan import DecoderNames
from calibration.model.source import TensorInfo
from calibration.quantize.held_out import HOLDING_EFFORTS
from calibration.quantize.output_metric import have_metrics, runs_of
from calibration.quantize.scale_fit import SCALE_OUTPUTS, SYSTEM_ELEMENTS
from calibration.settings.recipe import Recipe, rounds_jointly
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

# Python with torch, transformers and a processor, before any model.
BASE = 3 * 2**28
# Simultaneous copies for one input in its three phases: float32 [drawn, K], [K, K] and [N, K], and the systems of the
# scales. They were measured as peaks of quantize_input over T, K and N, and rounded up.
SEARCH_COPIES = 3.75
KEPT_COPIES = 2.25  # served inputs, 16-bit inputs, and their codes of one byte each
FACTOR_SQUARES, FACTOR_MATRICES = 4, 5
FIT_SQUARES, FIT_MATRICES, FIT_SYSTEMS = 3, 12, 3
# If outputs have metrics: their copies while codes are searched in runs.
METRIC_SQUARES = 4
# Of the head's weights, and of logits of so many tokens, which are in memory at once.
HEAD_COPIES, LOGITS_COPIES, LOGITS_TOKENS = 2, 3, 128
# Of experts: [K, K] of all together, and [drawn, K] of the tokens that chose one.
POOLED_SQUARES, PART_COPIES = 4, 1.25
# Gaps between tensors in the C library's heap.
HEAP = 2**26


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at the peak of each phase, without the hidden states."""

    # Embeddings and towers, with the towers' weights in memory, and read module by module.
    front: int
    front_streamed: int
    # The largest block, with one of its inputs being quantized.
    block: int
    # The head, for metrics of outputs; 0 without them.
    head: int = 0

    @property
    def most(self) -> int:
        """The peak if nothing is read from disk."""
        return max(self.front, self.block, self.head)

    @property
    def least(self) -> int:
        """The peak if all that can be is read from disk."""
        return max(self.front_streamed, self.block, self.head)

    @property
    def remedy(self) -> str:
        """The setting that lowers `least`, for a message."""
        if self.head == self.least:
            return "--effort fast"
        return "a smaller --sample-tokens" if self.block == self.least else "--dtype bfloat16"


def memory_need(
    architecture: Architecture,
    tensors: Mapping[str, TensorInfo],
    names: DecoderNames,
    spec: QuantizationSpec,
    recipe: Recipe,
    drawn_tokens: int,
    *,
    joint: bool = False,
) -> MemoryNeed:
    """The memory peaks of a calibration with `drawn_tokens` drawn tokens; `joint`: outputs get metrics."""
    width = getattr(torch, recipe.dtype).itemsize

    def nbytes(infos: Iterable[TensorInfo]) -> int:
        return sum(info.elements for info in infos) * width

    model_tensors = {name: info for name, info in tensors.items() if name.startswith(architecture.model_prefix)}
    towers = [info for name, info in model_tensors.items() if name.startswith(architecture.tower_prefixes)]
    head = stored_head(architecture, names, tensors)
    rest = [
        info
        for name, info in model_tensors.items()
        if not name.startswith((*architecture.tower_prefixes, f"{names.prefix}.")) and name != head
    ]
    largest = max((info.elements for info in towers), default=0) * width
    blocks = [
        _block(
            [info for name, info in model_tensors.items() if name.startswith(f"{names.prefix}.{index}.")],
            [layer for name, layer in spec.layers.items() if name.startswith(f"{names.prefix}.{index}.")],
            width,
            drawn_tokens,
            _experts(spec, names.layer(index, architecture.experts), drawn_tokens),
            joint=joint,
        )
        for index in range(names.blocks)
    ]
    return MemoryNeed(
        front=BASE + nbytes(rest) + nbytes(towers),
        front_streamed=BASE + nbytes(rest) + 2 * largest,
        block=BASE + max(blocks),
        head=BASE + nbytes(rest) + _head(head_tensor(architecture, names, tensors)) if joint else 0,
    )


def planned_need(
    architecture: Architecture,
    tensors: Mapping[str, TensorInfo],
    names: DecoderNames,
    spec: QuantizationSpec,
    recipe: Recipe,
) -> MemoryNeed:
    """The peaks before any data are known: with as many drawn tokens as the recipe has, and enough to learn from."""
    joint = rounds_jointly(recipe, learns=recipe.effort in HOLDING_EFFORTS and not spec.experts)
    return memory_need(architecture, tensors, names, spec, recipe, recipe.sample_tokens, joint=joint)


def _block(
    infos: Iterable[TensorInfo],
    layers: Iterable[LayerSpec],
    width: int,
    tokens: int,
    experts: tuple[int, int],
    *,
    joint: bool,
) -> int:
    """Bytes of one block: its weights, and the largest need of one of its inputs.

    `experts` are the input channels of its experts, and the bytes for quantizing them; 0 if it has none. `joint` says
    whether outputs have metrics.
    """
    inputs: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        inputs.setdefault(layer.shared_input, []).append(layer)
    # In the model's dtype, or in float32 once they are quantized; both for the linears that are being quantized.
    weights = sum(info.elements for info in infos) * max(width, 4)
    peaks = [experts[1]]
    # In bfloat16 they stay in memory with the block.
    metrics = 0
    waiting = sum(shards[0].in_features for shards in inputs.values()) + experts[0]
    for shards in inputs.values():
        k, n = shards[0].in_features, sum(layer.out_features for layer in shards)
        # The 16-bit model's inputs of later linears stay in memory until their turn.
        waiting -= k
        squares = sum(layer.out_features**2 for layer in shards) if joint and have_metrics(shards) else 0
        metrics += 2 * squares
        own = input_peak(tokens, k, n, shards[0].group_size, metrics=squares)
        peaks.append(4 * tokens * waiting + own + 4 * n * k)
    return weights + max(peaks) + metrics


def input_peak(tokens: int, k: int, n: int, group_size: int, *, metrics: int = 0) -> int:
    """Bytes for quantizing one input of K channels, its drawn `tokens` included, with N outputs of all shards.

    `metrics`: elements of the metrics of outputs.
    """
    groups = k // group_size
    outputs = min(n, SCALE_OUTPUTS, max(1, SYSTEM_ELEMENTS // groups**2))
    kept = KEPT_COPIES * tokens * k
    fitted: float = FIT_MATRICES
    if metrics:
        # The factor of the Hessian stays for all runs, and only the outputs of one run are fitted at a time.
        kept += METRIC_SQUARES * metrics + k * k
        fitted = min(FIT_MATRICES, FACTOR_MATRICES + FIT_MATRICES / runs_of(n))
    return HEAP + 4 * round(
        max(
            SEARCH_COPIES * tokens * k + n * k,
            kept + FACTOR_SQUARES * k * k + FACTOR_MATRICES * n * k,
            kept + FIT_SQUARES * k * k + fitted * n * k + FIT_SYSTEMS * outputs * groups**2,
        )
    )


def _head(weights: TensorInfo) -> int:
    """Bytes of the head's weights [vocabulary, hidden] in float32, and of logits."""
    return 4 * (HEAD_COPIES * weights.elements + LOGITS_COPIES * LOGITS_TOKENS * weights.shape[0])


def _experts(spec: QuantizationSpec, name: str, tokens: int) -> tuple[int, int]:
    """Input channels of the list of experts `name`, and bytes for quantizing it; 0 if the spec has none."""
    experts = spec.experts.get(name)
    if experts is None:
        return 0, 0
    k, inner, group_size = experts.in_features, experts.intermediate_features, experts.group_size
    # The checkpoint's tensors, and once more as they are served.
    results = 2 * sum(
        math.prod(want.shape) * want.dtype.itemsize
        for linear in experts.layers(name)
        for want in spec.stored_tensors(linear).values()
    )
    # Pooled: tokens and codes, moments and the factor of all weights. For one expert: its weights, its moments, and its
    # tokens, which are all tokens at worst.
    pooled = 4 * round(KEPT_COPIES * tokens * k + POOLED_SQUARES * k * k)
    search = 4 * round((SEARCH_COPIES - KEPT_COPIES) * tokens * k + k * k)
    one = 4 * 3 * inner * k + 4 * 2 * k * k + 4 * 2 * tokens * inner
    gate_up = one + input_peak(0, k, 2 * inner, group_size) + 4 * round(PART_COPIES * tokens * k)
    down = one + input_peak(tokens, inner, k, group_size)
    return k, results + pooled + max(search, gate_up, down)


def check_memory(
    need: MemoryNeed, budget: int, model: object, *, stated: bool = True, fitting_tokens: int | None = None
) -> None:
    """Raise MorphoQuantError with the sizes if a budget is too small even with streaming from disk.

    The budget is --memory-budget if it is `stated`, else a GPU's free memory. `fitting_tokens` are as many drawn tokens
    as a decoder block leaves room for, if fewer would do.
    """
    place = f"--memory-budget {_gib(budget)}" if stated else f"the GPU's {_gib(budget)} of free memory"
    remedy = "raise the budget" if stated else "pass --device cpu"
    fewer = "" if fitting_tokens is None else f", or pass --sample-tokens {fitting_tokens}"
    for held, nbytes, other in (
        ("its embeddings and one tower layer", need.front_streamed, ", or pass --dtype bfloat16"),
        ("a decoder block", need.block, fewer),
        ("its head in float32", need.head, ", or pass --effort fast"),
    ):
        if nbytes > budget:
            raise MorphoQuantError(
                f"{model}: does not fit {place}: {held} and the tensors of its calibration take "
                f"{_gib(nbytes)}; {remedy}{other}"
            )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}GiB"
