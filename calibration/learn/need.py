"""Memory and operations of learning, from sizes alone. Pure.

6 t N K   the products of a pass forward and one back, which runs the block again, for t tokens
"""

from __future__ import annotations

from collections.abc import Iterable

from calibration.learn.extent import EXTENTS, LONGEST
from calibration.quantize.held_out import SAMPLES_PER_HELD
from morphoquant_vllm.format.layers import LayerSpec

# Copies of a token's inputs and outputs of all linears of a block that a pass back holds, float32: values, codes, masks
# and gradients.
TOKEN_COPIES = 6


def learning_operations(layers: Iterable[LayerSpec], head: int, tokens: int, effort: str) -> float:
    """Floating-point operations of learning from about `tokens` tokens: targets, updates and judgements.

    `head` is the number of the head's weights.
    """
    extent = EXTENTS[effort]
    passed = min(tokens, extent.tokens)
    learned = passed * extent.passes_of(passed)
    judged = min(tokens // SAMPLES_PER_HELD, extent.judged_tokens)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    # Two passes for each judgement of an update and for that of the mean, and one for the start's.
    judgements = 2 * (extent.judgements + 1) + 1
    decoder = weights * (2 * (passed + judged) + 6 * learned + 2 * judgements * judged)
    return float(decoder + 6 * head * (learned + judgements * judged))


def decoder_bytes(layers: Iterable[LayerSpec]) -> int:
    """Bytes of all quantized linears in float32."""
    return sum(4 * layer.in_features * layer.out_features for layer in layers)


def learning_bytes(blocks: Iterable[Iterable[LayerSpec]], states: int, longest: int) -> int:
    """Bytes of learning with one block in memory: `states` are those of an update's samples before every block.

    `blocks` are the layers of each block, `longest` the tokens of the longest sample, at most LONGEST.
    """
    each = [2 * decoder_bytes(layers) + graph_bytes(layers, longest) for layers in map(list, blocks)]
    return max(each, default=0) + states


def graph_bytes(layers: Iterable[LayerSpec], longest: int) -> int:
    """Bytes that a pass back through a block of these layers needs of a sample of `longest` tokens, at most LONGEST."""
    values = sum(layer.in_features + layer.out_features for layer in layers)
    return 4 * TOKEN_COPIES * min(longest, LONGEST) * values
