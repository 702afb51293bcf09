"""Packs a model's arguments for its decoder blocks, other than hidden states, into tensors and JSON for files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError

# Prefix of the tensors' names.
ARGUMENT = "argument."


def pack(arguments: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and the JSON text from which `unpack` restores `arguments`; shared values are stored once.

    `arguments` holds those of each block, by keyword. Raises MorphoQuantError if a file cannot hold a value's type.
    """
    tensors: dict[int, tuple[str, Tensor]] = {}

    def encode(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            known, _ = tensors.setdefault(id(value), (f"{ARGUMENT}{len(tensors)}", value))
            return {"tensor": known}
        if isinstance(value, tuple | list):
            return {type(value).__name__: [encode(name, part) for part in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, Mapping) and not value:
            # A place in which blocks may leave something for later ones; discovery refuses those that do.
            return {"mapping": {}}
        raise MorphoQuantError(
            f"the model passes its blocks {name} of type {type(value).__name__}, which cannot be kept; "
            "this model is not supported"
        )

    distinct: dict[str, int] = {}
    blocks = []
    for passed in arguments:
        text = json.dumps({name: encode(name, value) for name, value in passed.items()})
        blocks.append(distinct.setdefault(text, len(distinct)))
    layout = json.dumps({"distinct": [json.loads(text) for text in distinct], "blocks": blocks})
    return {name: value.detach().cpu().contiguous() for name, value in tensors.values()}, layout


def unpack(tensors: Mapping[str, Tensor], layout: str, device: torch.device) -> list[Mapping[str, Any]]:
    """Restore the arguments of each block, on `device`; blocks share values as before."""
    moved: dict[str, Tensor] = {}

    def decode(code: Mapping[str, Any]) -> Any:
        ((kind, content),) = code.items()
        if kind == "tensor":
            return moved.setdefault(content, tensors[content].to(device))
        if kind == "value":
            return content
        if kind == "mapping":
            return {}
        parts = [decode(part) for part in content]
        return tuple(parts) if kind == "tuple" else parts

    read = json.loads(layout)
    distinct = [{name: decode(code) for name, code in passed.items()} for passed in read["distinct"]]
    return [distinct[index] for index in read["blocks"]]
