"""The hidden states between two blocks, on disk: the newest complete generation, and the one being written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.work.block_arguments import ARGUMENT, unpack
from calibration.work.durable_files import FileRecord, StatesWriter, damaged, read_metadata, read_tensors

# The 16-bit model's hidden states, and those after the quantized blocks.
STREAMS = ("hidden", "served")
TOWERS_FILE = "towers.safetensors"


def sample_file(directory: Path, index: int) -> Path:
    """The file of one sample's decoder inputs: its modality, positions, hidden states and the blocks' arguments."""
    return directory / f"sample-{index:05}.safetensors"


def states_file(directory: Path, stream: str, generation: int, process: int = 0) -> Path:
    """The file of one stream's hidden states of all samples of a process before the block `generation`."""
    of_process = f"-process{process}" if process else ""
    return directory / f"{stream}-{generation:05}{of_process}.safetensors"


class Stream:
    """One stream's hidden states before the block `generation`, in the model's dtype, bit for bit.

    The states before the first block are in the samples' files: one state for both streams, or two if `separate`.
    They are separate if towers are quantized too. `samples` and `shapes` are those of a process's samples, in order.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        generation: int,
        samples: Sequence[int],
        shapes: Sequence[Sequence[int]],
        process: int = 0,
        *,
        separate: bool = False,
    ) -> None:
        self.generation = generation
        self._first = name if separate else "hidden"
        self._directory, self._name, self._samples, self._shapes = directory, name, samples, shapes
        self._process = process
        self._writer: StatesWriter | None = None

    def read(self, index: int) -> Tensor:
        """States [1, M, hidden] of the process's sample `index`; MorphoQuantError if the file is missing or damaged."""
        if self.generation == 0:
            path, name = sample_file(self._directory, self._samples[index]), self._first
        else:
            path, name = self.file, str(index)
        return read_tensors(path, (name,))[name]

    def write(self, index: int, value: Tensor) -> None:
        """Write a sample's states of the next generation; samples come in order."""
        if self._writer is None:
            path = states_file(self._directory, self._name, self.generation + 1, self._process)
            self._writer = StatesWriter(path, self._shapes, value.dtype)
        self._writer.write(index, value)

    @property
    def file(self) -> Path:
        """The file that is read, except before the first block."""
        return states_file(self._directory, self._name, self.generation, self._process)

    @property
    def writing(self) -> bool:
        """Whether some of the next generation has been written."""
        return self._writer is not None

    def finish(self) -> tuple[Path, FileRecord]:
        """Complete the next generation, from which `read` then reads; the older file stays."""
        assert self._writer is not None
        record = self._writer.finish()
        self._writer = None
        self.generation += 1
        return self.file, record


@dataclass
class DiskInput:
    """A capture.BlockInput whose hidden states and arguments are read from and written to files at each call."""

    modality: Tensor
    positions: Tensor
    index: int
    path: Path
    streams: Mapping[str, Stream]
    device: torch.device

    @property
    def hidden(self) -> Tensor:
        return self.streams["hidden"].read(self.index)

    @property
    def served(self) -> Tensor:
        return self.streams["served"].read(self.index)

    @property
    def arguments(self) -> list[Mapping[str, Any]]:
        return read_arguments(self.path, self.device)

    def write_hidden(self, value: Tensor) -> None:
        self.streams["hidden"].write(self.index, value)

    def write_served(self, value: Tensor) -> None:
        self.streams["served"].write(self.index, value)


def read_arguments(path: Path, device: torch.device) -> list[Mapping[str, Any]]:
    """The model's arguments of each block for one sample, from the sample's file."""
    layout = read_metadata(path).get("arguments")
    if layout is None:
        raise damaged(path, "it holds no arguments")
    return unpack(read_tensors(path, prefix=ARGUMENT), layout, device)


def read_sample(directory: Path, index: int, device: torch.device) -> MemoryInput:
    """The decoder's input of a sample, in the 16-bit stream and in the served one."""
    path = sample_file(directory, index)
    # Quantized towers begin the served stream with states of their own.
    served = ("served",) if (directory / TOWERS_FILE).exists() else ()
    tensors = read_tensors(path, ("modality", "positions", "hidden", *served))
    return MemoryInput(**{"served": tensors["hidden"], **tensors}, arguments=read_arguments(path, device))
