"""The int8 memory into which one layer at a time is unpacked, shared by all layers of a device; see int8_path.py.

It grows to the need of the largest layer while layers are loaded, and is freed with the last layer.

One stream has it at a time; see turn.py. Memory that a captured graph uses is freed with the layers.
"""

from __future__ import annotations

import logging
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from morphoquant_vllm import environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu.turn import Turn

logger = logging.getLogger("vllm.morphoquant_vllm.gpu.workspace")
MIB = 1 << 20


class Workspace:
    """The workspace of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.int8, device=device)
        self.address = 0
        # Memory of graphs that were captured before the workspace grew.
        self.seen_by_graphs: list[Tensor] = []
        self.is_seen = False
        self.turn = Turn(device)

    def grow(self, size: int) -> None:
        """Hold `size` bytes at least; the address changes if it grows. Raises MorphoQuantError if they do not fit."""
        if size <= self.memory.numel():
            return
        if self.is_seen:
            self.seen_by_graphs.append(self.memory)
        # Freed first, so the larger one may use the same memory.
        self.memory = torch.empty(0, dtype=torch.int8, device=self.device)
        try:
            self.memory = torch.empty(size, dtype=torch.int8, device=self.device)
        except torch.OutOfMemoryError:
            raise MorphoQuantError(
                f"the int8 workspace of {size / MIB:.1f} MiB does not fit into the free memory of {self.device}; "
                f"set {environment.WORKSPACE}=0 to serve long prompts without it, or serve on more GPUs"
            ) from None
        self.address, self.is_seen = self.memory.data_ptr(), False
        logger.info(
            "The int8 workspace of long prompts takes %.1f MiB on %s, shared by all layers; %s=0 turns it off.",
            *(size / MIB, self.device, environment.WORKSPACE),
        )

    def serves(self, stream: int) -> bool:
        """Whether a call on `stream`, the current one, may use the workspace now."""
        if self.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
            self.is_seen = True
        return self.turn.serves(stream)


# The layers hold references to their workspace.
_WORKSPACES: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def workspace_of(device: torch.device) -> Workspace:
    """The one workspace of a device; the caller must hold a reference to it."""
    found = _WORKSPACES.get(device)
    if found is None:
        found = Workspace(device)
        _WORKSPACES[device] = found
    return found
