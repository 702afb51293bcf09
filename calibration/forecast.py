"""What a calibration will do, from sizes alone: layers, tokens, memory and disk. Pure."""

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
    # Routed experts of all blocks.
    experts: int = 0

    def lines(self) -> list[str]:
        """The forecast for people."""
        tokens = ", ".join(f"{row} {count}" for row, count in self.tokens.items())
        tight = "" if self.memory <= self.memory_limit else "; parts are read from disk instead, which is slower"
        experts = f" and {self.experts} experts" if self.experts else ""
        return [
            f"{self.layers} linears{experts} in {self.blocks} blocks, on {self.samples} samples",
            f"tokens: {tokens}; the search looks at {self.sampled_tokens}",
            f"memory: up to {_gb(self.memory)} of {_gb(self.memory_limit)}{tight}",
            f"disk: {_gb(self.work)} for the work directory until the end, {_gb(self.checkpoint)} for the checkpoint",
            "time: the line of each block has an estimate of the rest",
        ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
