"""Whose turn it is: memory that the layers of a device share is used by one stream at a time.

The layers of one stream run in order, so each finds the memory free. Another stream takes its turn when the one before
has nothing left to do; until then its layers are served without that memory. vLLM runs our layers in order on one
stream; it has a second one for the shared experts of mixtures of experts, whose layers are not ours. CUDA graphs are
captured on a stream of their own and replayed in order with the rest.
"""

from __future__ import annotations

import torch


class Turn:
    """The turn at some memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: int | None = None

    def serves(self, stream: int) -> bool:
        """Whether a call on this stream, the current one, may use the memory now. While it is captured it may."""
        if self.device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return True
        if stream != self.stream and not self._is_idle():
            return False
        self.stream = stream
        return True

    def _is_idle(self) -> bool:
        """Whether the stream that has it has done all its work."""
        return self.stream is None or torch.cuda.ExternalStream(self.stream, self.device).query()
