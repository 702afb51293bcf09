"""Seeded weights with the difficulties of trained ones: outlier channels, a massive token, modality-specific channels.

Every tensor depends only on its name and the seed, not on the order of drawing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Factors of the heavy channels of decoder norms: the activations of every linear behind them carry them as outliers.
NORM_OUTLIERS = (10.0, 20.0, 30.0)
# Channels of the residual stream in which the first token of a conversation is massive, and how far it reaches. Others
# have about 1.
MASSIVE_CHANNELS, MASSIVE = 4, 400.0
# Part of the channels that a tower makes heavy for its own modality, and by how much; each tower has its own.
HEAVY_PART, HEAVY = 0.01, 20.0
_EMBEDDINGS = ("thinker.model.embed_tokens.weight", "model.embed_tokens.weight")
_HEAVY_TOWERS = ("thinker.visual.merger.mlp.2", "thinker.audio_tower.proj")
_DECODER_NORMS = ("input_layernorm", "post_attention_layernorm")


def draw(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int, massive_token: int) -> Tensor:
    """A tensor by its published name. `massive_token` is the id that starts every conversation.

    Matrices keep the variance of their input, so activations are of order 1 at any size. Logits have a standard
    deviation of about 4.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    noise = torch.randn(tuple(shape), generator=generator)
    stem, _, kind = name.rpartition(".")
    parent = stem.rpartition(".")[2]
    if kind == "bias":
        noise *= 0.5 if parent in ("q_proj", "k_proj", "v_proj") else 0.1
    elif len(shape) < 2:
        noise.mul_(0.1).add_(1)
        if parent in _DECODER_NORMS:
            channels = torch.randperm(shape[0], generator=generator)[: len(NORM_OUTLIERS)]
            noise[channels] *= torch.tensor(NORM_OUTLIERS)
    elif parent not in ("embed_tokens", "audio_bos_eos_token"):
        noise *= (4.0 if parent == "lm_head" else 1.0) / math.sqrt(math.prod(shape[1:]))
    if name in _EMBEDDINGS:
        noise[massive_token, :MASSIVE_CHANNELS] = MASSIVE
    if stem in _HEAVY_TOWERS:
        noise[_heavy_rows(shape[0], _HEAVY_TOWERS.index(stem))] *= HEAVY
    return noise.to(dtype)


def _heavy_rows(channels: int, tower: int) -> Tensor:
    count = max(1, round(HEAVY_PART * channels))
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    return order[tower * count : (tower + 1) * count]
