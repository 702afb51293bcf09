"""Counts of tokens and escapes by row, for a layer's codes."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.numerics.activation import escapes

# The columns of the counts. Massive tokens and their escapes count in their modality's figures, too.
COLUMNS = ("tokens", "escapes", "massive_tokens", "massive_escapes")


def add_escape_counts(counts: Tensor, codes: Tensor, modality: Tensor, massive: Tensor, live: Tensor) -> None:
    """Add the counts of the first `live` tokens to `counts`, int64 [R, len(COLUMNS)], in place and without a sync.

    codes int8 [M, K]; modality int32 [M or more], the row of each token; massive bool [M]; live int64 [].
    """
    tokens = codes.shape[0]
    counted = torch.arange(tokens, device=codes.device) < live
    escaped = escapes(codes).sum(1)
    columns = torch.stack((torch.ones_like(escaped), escaped, massive, escaped * massive), 1)
    counts.index_add_(0, modality[:tokens].long(), columns * counted[:, None])
