"""Sizes of a model's linears by its config alone."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.models.decoder import architecture_of, linears_of


def linear_widths(directory: Path) -> dict[str, int]:
    """K of every linear of the decoder's blocks, by its name below them; no weights are read.

    Routed experts, which transformers merges into parameters of their own, are not among them.
    """
    architecture, _ = architecture_of(directory)
    model_class = getattr(transformers, architecture.model_class)
    config = model_class.config_class.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config)
    linears = linears_of(model.get_submodule(architecture.block_module))
    return {name: linear.in_features for name, linear in linears.items()}
