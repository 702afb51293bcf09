"""What a calibration will do: layers, tokens, memory, disk and time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """The work of a calibration, and its need of one process; sizes are in bytes."""

    layers: int
    blocks: int
    samples: int
    # Tokens of each row in all samples.
    tokens: Mapping[str, int]
    sampled_tokens: int
    memory: int
    memory_limit: int
    # Of the work directory, and of the new checkpoint's tensors and files.
    work: int
    checkpoint: int
    # Of the decoder's blocks; None if there is no estimate.
    seconds: float | None
    # Of learning after them; None if nothing learns.
    learning_seconds: float | None = None
    # Routed experts of all blocks.
    experts: int = 0

    def lines(self) -> list[str]:
        """The forecast for people."""
        tokens = ", ".join(f"{row} {count}" for row, count in self.tokens.items())
        tight = "" if self.memory <= self.memory_limit else "; parts are read from disk instead, which is slower"
        more = "" if self.learning_seconds is None else "; learning may take more of it"
        experts = f" and {self.experts} experts" if self.experts else ""
        return [
            f"{self.layers} linears{experts} in {self.blocks} blocks, on {self.samples} samples",
            f"tokens: {tokens}; the search looks at {self.sampled_tokens}",
            f"memory: up to {_gb(self.memory)} of {_gb(self.memory_limit)}{tight}{more}",
            f"disk: {_gb(self.work)} for the work directory until the end, {_gb(self.checkpoint)} for the checkpoint",
            f"time: {self._time()}",
        ]

    def _time(self) -> str:
        if self.seconds is None:
            return "the line of each block has an estimate of the rest"
        learning = "" if self.learning_seconds is None else f" and {duration(self.learning_seconds)} for learning"
        return (
            f"about {duration(self.seconds)} for the blocks{learning}, a rough estimate if nothing else runs on this "
            "machine; the line of each block has a better one"
        )


def duration(seconds: float) -> str:
    """Seconds for people, in two figures at most."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} s"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
