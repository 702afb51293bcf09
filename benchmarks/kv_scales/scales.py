"""The magnitudes of keys and values by layer and modality, and attention that rounds them to FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROWS = ("text", "image", "video", "audio")
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
# As the plugin makes them: twice the magnitudes of calibration are not clipped.
HEADROOM = 2.0
# What an attention does to its keys, or values: layer, part, tensor [batch, heads, tokens, channels] and modality
# [batch, tokens] give the tensor that it takes.
Change = Callable[[int, str, Tensor, Tensor], Tensor]


class Magnitudes:
    """The largest keys and values by layer, part and modality; a `Change` that changes nothing."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], Tensor] = {}

    def __call__(self, layer: int, part: str, tensor: Tensor, modality: Tensor) -> Tensor:
        largest = tensor.abs().amax((1, 3))
        seen = torch.stack(
            [torch.nn.functional.pad(largest[modality == row], (1, 0)).max() for row in range(len(ROWS))]
        )
        self.found[layer, part] = torch.maximum(self.found.get((layer, part), seen), seen)
        return tensor


def rounding(found: dict[tuple[int, str], Tensor], by_modality: bool) -> Change:
    """Round to FP8 by one scale for each layer, or by one for each modality too."""

    def change(layer: int, part: str, tensor: Tensor, modality: Tensor) -> Tensor:
        largest = found[layer, part]
        scale = (largest if by_modality else largest.max().expand(len(ROWS))) * HEADROOM / LARGEST
        return to_fp8(tensor, scale.clamp(min=torch.finfo(torch.float32).tiny)[modality][:, None, :, None])

    return change


def to_fp8(tensor: Tensor, scale: Tensor) -> Tensor:
    """The tensor as an FP8 cache gives it back: divided by `scale`, clipped, rounded, and multiplied again."""
    return (tensor / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


@contextmanager
def changed_attention(thinker: Any, placeholders: dict[int, int], change: Change) -> Iterator[None]:
    """Let `change` have the keys and values of the decoder; `placeholders` gives the modality of a token id."""
    modality = torch.empty(0, dtype=torch.long)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    decoder = {id(block.self_attn) for block in thinker.model.layers}

    def note(embedding: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal modality
        modality = torch.zeros_like(inputs[0])
        for token, row in placeholders.items():
            modality[inputs[0] == token] = row

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any) -> Any:
        if id(module) in decoder:
            key, value = (change(module.layer_idx, part, x, modality) for part, x in (("key", key), ("value", value)))
        return plain(module, query, key, value, *arguments, **named)

    handle = thinker.get_input_embeddings().register_forward_pre_hook(note)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        handle.remove()
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
