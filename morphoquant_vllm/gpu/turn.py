"""The turns of streams: one stream at a time uses the memory that the layers of a device share.

The layers of one stream run in order, so the memory is free for each. Another stream takes its turn when the stream
before is idle. Until then its layers are served without that memory. vLLM runs our layers in order on one stream. Its
second stream is for the shared experts of mixtures of experts, whose layers are not ours. CUDA graphs are captured on a
separate stream and replayed in order with the rest.
"""

from __future__ import annotations

import torch


class Turn:
    """The turn of streams at some memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: int | None = None

    def serves(self, stream: int) -> bool:
        """Whether a call on `stream`, the current one, may use the memory now. During a capture it always may."""
        if self.device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return True
        if stream != self.stream and not self._is_idle():
            return False
        self.stream = stream
        return True

    def _is_idle(self) -> bool:
        """Whether the stream whose turn it is has finished all its work."""
        return self.stream is None or torch.cuda.ExternalStream(self.stream, self.device).query()
