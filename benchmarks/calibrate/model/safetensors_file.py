"""Writes a safetensors file one tensor at a time: the library's own writers take all tensors of a file at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# Names of safetensors' headers.
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def header(wanted: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The header of a file of these tensors (which may be on the meta device), and the order of their data."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider elements first, as the library writes them: so every tensor is aligned.
    order = sorted(wanted, key=lambda name: (-wanted[name].element_size(), name))
    for name in order:
        end = offset + wanted[name].nbytes
        place = {"dtype": DTYPES[wanted[name].dtype], "shape": list(wanted[name].shape), "data_offsets": [offset, end]}
        fields[name] = place
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def write_safetensors(path: Path, wanted: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
    """Write a tensor for each of `wanted`, which may be on the meta device; `load` gives its values by name.

    The format is that of https://github.com/huggingface/safetensors#format: the header's length as 8 bytes, the header
    as JSON padded with blanks to a multiple of 8, the data.
    """
    text, order = header(wanted)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            values = load(name)
            if values.shape != wanted[name].shape or values.dtype != wanted[name].dtype:
                raise ValueError(f"{name}: {values.dtype} {list(values.shape)} was not announced")
            values.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
