"""Damage to tensors on which file and index agree, as by a faulty writer."""

import json
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.fuzz.byte_damage import read_header, write_header
from tests.fuzz.json_damage import damage_json

INDEX = "model.safetensors.index.json"
_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e8m0fnu, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
_HUGE = (float("nan"), float("inf"), -float("inf"), 3.3e38, -3.3e38, 1e19, 1e-38, 1e-45, 0.0, -0.0, -1.0, 255.0, 16.0)


def damage_tensors(directory: Path, path: Path, random: Random) -> str:
    """Change the tensors of a safetensors file in one way, in the index too; a description of the change.

    Raises what safetensors raises where earlier damage keeps the file from being read or written.
    """
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Few belong to no layer.
    carried = [name for name in tensors if "layers" not in name]
    name = random.choice(carried if carried and random.random() < 0.25 else list(tensors))
    changes = (_move, _move, _cast, _reshape, _cut, _scale, _fill, _fill_one, _permute, _random, _swap, _layer)
    told = random.choice(changes)(tensors, name, random)
    path.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    index = directory / INDEX
    if path.parent == directory and index.is_file():
        content = json.loads(index.read_text())
        placed = {key: place for key, place in content["weight_map"].items() if place != path.name or key in tensors}
        content["weight_map"] = placed | dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(content))
    return f"{path.name}: {told}"


def _move(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    kind = random.choice(("drop", "rename", "copy"))
    new = random.choice((f"{name}_", name.replace("layers.0", "layers.1"), "lm_head.weight", "x", f"{name}.weight"))
    if kind != "drop":
        tensors[new] = tensors[name].clone()
    if kind != "copy" and new != name:
        del tensors[name]
    return f"{kind} {name} {new if kind != 'drop' else ''}"


def _cast(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    dtype = random.choice(_DTYPES)
    tensors[name] = tensors[name].float().to(dtype)
    return f"{name} as {dtype}"


def _reshape(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    old = tensors[name]
    shape = random.choice(((-1,), (1, *old.shape), (*old.shape, 1), tuple(reversed(old.shape)), (2, -1)))
    if old.numel() % 2 == 0:
        tensors[name] = old.reshape(shape)
    return f"{name} in shape {shape}"


def _cut(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    left = random.choice((0, -1, 1))
    tensors[name] = tensors[name][:left] if tensors[name].dim() else tensors[name]
    return f"{name} cut to [:{left}]"


def _scale(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    factor = random.choice((2.0, -1.0, 0.5, 1e10, 1e30, 1e-30, 1.001))
    tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    return f"{name} times {factor}"


def _fill(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    value = random.choice(_HUGE)
    tensors[name] = torch.full(tensors[name].shape, value, dtype=torch.float32).to(tensors[name].dtype)
    return f"{name} all {value}"


def _fill_one(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    value, tensor = random.choice(_HUGE), tensors[name].clone()
    at = random.randrange(max(1, tensor.numel()))
    if tensor.numel():
        tensor.view(-1)[at] = torch.tensor(value).to(tensor.dtype)
    tensors[name] = tensor
    return f"{name}[{at}] = {value}"


def _permute(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    if tensors[name].dim():
        axis = random.randrange(tensors[name].dim())
        order = torch.tensor(random.sample(range(tensors[name].shape[axis]), tensors[name].shape[axis])).long()
        tensors[name] = tensors[name].view(torch.uint8 if tensors[name].itemsize == 1 else tensors[name].dtype)
        tensors[name] = tensors[name].index_select(axis, order)
    return f"{name} permuted"


def _random(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    old = tensors[name]
    size = old.numel() * old.itemsize
    if size:
        values = torch.tensor(list(random.randbytes(size)), dtype=torch.uint8)
        values = values % 2 if old.dtype is torch.bool else values
        tensors[name] = values.view(old.dtype).reshape(old.shape)
    return f"{name} of random bytes"


def _swap(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    alike = [other for other in tensors if tensors[other].shape == tensors[name].shape]
    other = random.choice(alike)
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{name} and {other} swapped"


def _layer(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    """All tensors of one layer at once."""
    layer = name.rpartition(".")[0]
    own = [key for key in tensors if key.startswith(f"{layer}.")]
    new = random.choice((None, layer.replace("layers.0", "layers.1"), f"{layer}.base", "x"))
    for key in own:
        tensor = tensors.pop(key)
        if new is not None:
            tensors[new + key.removeprefix(layer)] = tensor
    return f"layer {layer} becomes {new}"


def damage_header(path: Path, random: Random) -> str:
    """Change the header of a safetensors file as JSON; the data stay. ValueError where it cannot be read."""
    header, data = read_header(path)
    text, told = damage_json(header, random)
    write_header(path, text, data)
    return f"{path.name}: header {told}"
