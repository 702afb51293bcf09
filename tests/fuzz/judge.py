"""Whether an accepted mutant is harmless; nothing that is under test is called.

Files are read with safetensors and json. Layers run on the torch reference, on ordinary, huge and massive tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from morphoquant_vllm.numerics.activation import activation_record
from morphoquant_vllm.numerics.linear import linear, weight_record

# Fields of config.json that may differ without changing the served model.
FREE = ("quantization_config", "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
FREE += ("use_cache",)
DEFAULTS = {"bias": False, "scale_scheme": "group", "fixed_row": "", "weight_bits": 4}
INPUTS = ("activation_step", "channel_order", "modality_mask", "centre", "gain")
INPUTS += ("massive_channel", "massive_low", "massive_high")
OUTPUTS = ("weight_codes", "weight_scale", "weight_level", "absorbed_bias", "weight_channel_scale", "bias")
TOKENS = 12


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the weight files by name; AssertionError where two files hold one, or the index is of others."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found and index[name] == path.name, f"{name} is not where the index says"
                found[name] = file.get_tensor(name)
    assert index.keys() == found.keys(), "the index names other tensors than the files hold"
    return found


def outputs(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output of each listed layer by its name, float32 [TOKENS, N]."""
    found = {}
    for name, layer in settings["layers"].items():
        own = {key: tensors[f"{name}.{key}"] for key in (*INPUTS, *OUTPUTS) if f"{name}.{key}" in tensors}
        record = activation_record(*(own[key] for key in INPUTS))
        scale = own["weight_level" if layer.get("scale_scheme") == "two_level" else "weight_scale"]
        weight = weight_record(own["weight_codes"], scale, own["absorbed_bias"], own.get("weight_channel_scale"))
        rows = (torch.arange(TOKENS) % (len(settings["rows"]) - 1)).int()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(TOKENS, layer["in_features"], generator=generator)
        x[-2:] *= torch.tensor([[1e4], [1e38]])
        found[name] = linear(x.clamp(-3e38, 3e38), rows, weight, record, own.get("bias"))
    return found


def meaning(config: Mapping[str, Any]) -> str:
    """The content of config.json about the model and its quantization, except free text and digests."""
    settings = dict(config["quantization_config"])
    layers = {name: DEFAULTS | layer for name, layer in settings.get("layers", {}).items()}
    kept = {key: value for key, value in settings.items() if key not in ("created_by", "integrity")}
    # Reserved for later versions: empty is absent.
    kept = {key: value for key, value in kept.items() if value or key not in ("experts", "kv_cache")}
    model = {key: value for key, value in config.items() if key not in FREE}
    # Numbers of another type are another value.
    return json.dumps([model, kept | {"layers": layers}], sort_keys=True)


class Judge:
    """Knows the intact checkpoint."""

    def __init__(self, intact: Path) -> None:
        config = json.loads((intact / "config.json").read_text())
        self._meaning = meaning(config)
        self._tensors = read_tensors(intact)
        self._outputs = outputs(config["quantization_config"], self._tensors)
        assert all(bool(value.isfinite().all()) for value in self._outputs.values())

    def fault(self, directory: Path, *, resealed: bool) -> str | None:
        """The fault of an accepted checkpoint; None if it has none.

        One that was resealed may hold other values than the intact one, but its outputs must be finite.
        """
        try:
            config = json.loads((directory / "config.json").read_text())
            tensors = read_tensors(directory)
            found = outputs(config["quantization_config"], tensors)
        except Exception as error:
            return f"cannot be computed: {type(error).__name__}: {error}"
        for name, value in found.items():
            if not bool(value.isfinite().all()):
                return f"{name}: gives {value[~value.isfinite()][0]} for finite inputs"
        for name, value in tensors.items():
            if _holds_nan(value):
                return f"{name}: holds NaN"
        if resealed:
            return None
        if meaning(config) != self._meaning:
            return "config.json means something else"
        if tensors.keys() != self._tensors.keys():
            return f"other tensors: {sorted(tensors.keys() ^ self._tensors.keys())[:3]}"
        for name, value in self._outputs.items():
            if not _equal(found[name], value):
                return f"{name}: gives other numbers"
        for name, value in self._tensors.items():
            if not _equal(tensors[name], value):
                return f"{name}: holds other values"
        return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """To the bit; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _holds_nan(tensor: Tensor) -> bool:
    if tensor.dtype is torch.float4_e2m1fn_x2:
        return False
    return bool((tensor.cfloat() if tensor.is_complex() else tensor.double()).isnan().any())
