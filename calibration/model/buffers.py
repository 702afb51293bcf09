"""The tensors of a block that no weight file holds, since transformers computes them: tables of positions, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compute_buffers(model: Any, block: nn.Module) -> list[str]:
    """Compute the buffers of a block that no file holds, in place and on the CPU; names of those that stay unknown.

    `model` is the block's model of transformers. The block's parameters must be on the meta device: transformers'
    function that computes buffers also draws parameters.
    """
    stored = block.state_dict()
    unknown = []
    for name, buffer in [entry for entry in block.named_buffers() if entry[0] not in stored]:
        parent, _, last = name.rpartition(".")
        module = block.get_submodule(parent)
        found = []
        # A buffer that is left as it was shows by its first values.
        for first in (0, 1):
            module.register_buffer(last, torch.full_like(buffer, first, device="cpu"), persistent=False)
            model._init_weights(module)
            found.append(module.get_buffer(last))
        if not torch.equal(*found):
            unknown.append(name)
    return unknown
