"""A stand-in for the streams of a GPU that is not there."""

import torch


class Streams:
    """CUDA's streams as the workspace sees them."""

    def __init__(self) -> None:
        self.busy: set[int] = set()
        self.capturing = False

    def stream(self, handle: int, _: torch.device) -> "Streams":
        self.asked = handle
        return self

    def query(self) -> bool:
        assert not self.capturing, "that would end the capture"
        return self.asked not in self.busy
