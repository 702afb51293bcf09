"""A checkpoint whose rows differ visibly, from one whose rows are equal."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor

from morphoquant_vllm.format.checkpoint import check_headers, load_layer, read_spec
from morphoquant_vllm.format.layers import input_blocks, stored_name
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import weights
from tests.checkpoints import edit_tensors, file_of


def write_differing_rows(source: Path, target: Path) -> Path:
    """Copy a checkpoint to `target` and give each modality gains, centres, masks and constants of its own.

    The constants follow the centres, so that the layers still compute something like the source's; on top of that they
    differ by noise, so that the row of a token shows in the model's output.
    """
    shutil.copytree(source, target)
    spec = read_spec(target)
    files = check_headers(target, spec)
    changes: dict[Path, dict[str, Tensor | None]] = {}
    for group, names in spec.shared_inputs().items():
        generator = torch.Generator().manual_seed(zlib.crc32(group.encode()))
        stored = {name: load_layer(target, files, name, spec) for name in names}
        shared = _input_tensors(stored[names[0]], spec, generator)
        moved = shared["centre"] - stored[names[0]]["centre"]
        for name, tensors in stored.items():
            noise = torch.randn(tensors["absorbed_bias"].shape[1:], generator=generator)
            noise[-1] = 0
            absorbed = tensors["absorbed_bias"] + weights.absorbed_bias(
                _matrix(tensors), moved, input_blocks(spec.layers[name], spec.tensor_parallel)
            )
            absorbed[0] += 0.3 * noise
            for tensor, value in {**shared, "absorbed_bias": absorbed}.items():
                full = stored_name(name, tensor)
                changes.setdefault(file_of(target, full), {})[full] = value.clone()
    for path, tensors in changes.items():
        edit_tensors(path, tensors)
    return target


def _input_tensors(tensors: dict[str, Tensor], spec: QuantizationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """gain, centre and mask of all rows but the massive one anew; any's mask still holds all of them."""
    rows, channels = tensors["centre"].shape
    gain = tensors["gain"] * (0.75 + 0.5 * torch.rand(rows, generator=generator))
    centre = tensors["centre"] + tensors["activation_step"] * torch.randn(rows, channels, generator=generator)
    mask = tensors["modality_mask"] & (torch.rand(rows, channels, generator=generator) < 0.8)
    mask[spec.any_row] = tensors["modality_mask"][spec.any_row]
    changed = {"gain": gain, "centre": centre, "modality_mask": mask}
    for name, value in changed.items():
        value[-1] = tensors[name][-1]
    return changed


def _matrix(tensors: dict[str, Tensor]) -> Tensor:
    """The dequantized weight matrix [N, K] of a layer, in natural channel order, the steps taken out again."""
    two_level = "weight_level" in tensors
    scales = ("weight_level", "weight_channel_scale") if two_level else ("weight_scale",)
    permuted = weights.dequantize_weight(tensors["weight_codes"], *(tensors[name] for name in scales))
    natural = torch.empty_like(permuted)
    natural[:, tensors["channel_order"].long()] = permuted
    return natural / tensors["activation_step"]
