"""What calibration keeps of each input's distribution, for `morphoquant report`: a small file beside the weights.

It lies in a folder of its own, since loaders take every safetensors file at the top for weights. Nothing that serves a
checkpoint reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.data.token_choice import TokenSample
from calibration.quantize.layer import InputSample
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import open_file
from morphoquant_vllm.format.schema import INPUT_TENSORS, QuantizationSpec
from morphoquant_vllm.numerics.activation import ESCAPE_MAX, ESCAPE_MIN, act_quant, activation_record, token_rows
from morphoquant_vllm.numerics.reference import dispersion_score
from morphoquant_vllm.numerics.statistics import ChannelStatistics

DISTRIBUTIONS_FILE = "morphoquant_calibration/distributions.safetensors"
# Channels whose ranges are kept: the most dispersed, and as many evenly spaced ones.
MOST_DISPERSED = 128
EVENLY_SPACED = 128
# Tokens that are looked at once more.
TOKENS = 2048
# The inner range of a channel.
QUANTILES = (0.01, 0.99)
CODE_BINS = ESCAPE_MAX - ESCAPE_MIN + 1
# Tensors [C] of a row; the inner range is kept only where tokens were sampled.
_RANGES = ("minimum", "maximum", "low", "high")
_MAY_BE_MISSING = (".low", ".high")
# A sum of so many counts fits int64.
_LARGEST_COUNT = 2**53
_AGAIN = "copy it from the original checkpoint, or calibrate again"


def observe(
    inputs: InputSample, tokens: TokenSample, tensors: Mapping[str, Tensor], spec: QuantizationSpec
) -> dict[str, Tensor]:
    """The record of one input; C kept channels, `<row>` a modality's name or "massive", only where it had tokens.

        channels                    int32 [C], ascending
        <row>.minimum, .maximum     bfloat16 [C], over all tokens
        <row>.low, .high            bfloat16 [C], the 1 % and 99 % quantiles over sampled tokens
        <row>.dispersion            bfloat16 [K], over all tokens
        <row>.codes                 int64 [256], how often sampled tokens had each served code, -128 first

    `tensors` are a quantized layer's on that input.
    """
    statistics = inputs.observation.statistics
    x, processes = inputs.observation.sample, tokens.processes
    stride = max(1, tokens.modality.numel() // TOKENS)
    modality = tokens.modality[::stride].to(x.device)
    x, own_modality = tokens.every(x, stride), tokens.every(tokens.own(tokens.modality), stride).to(x.device)
    record = activation_record(*(tensors[name].to(x.device) for name in INPUT_TENSORS))
    own_rows = token_rows(x, own_modality, record)
    codes = act_quant(x, own_rows, record)
    pooled = reduce(ChannelStatistics.merge, statistics.values())
    channels = processes.decide(lambda: kept_channels(dispersion_score(pooled).cpu()))
    found = {"channels": channels.int()}
    owners = tokens.token_owners[::stride]
    rows, gathered = (processes.merge(part, owners) for part in (own_rows, x[:, channels.to(x.device)]))
    quantiles = torch.tensor(QUANTILES, device=x.device)
    massive_row = len(spec.rows) - 1
    # Massive by the block's residual stream in the statistics, by the quantizer's intervals among sampled tokens.
    for row, seen in statistics.items():
        name = spec.rows[row]
        found |= _ranges(name, seen, channels)
        taken, own = (
            served == massive_row if row == massive_row else (of == row) & (served != massive_row)
            for served, of in ((rows, modality), (own_rows, own_modality))
        )
        if bool(taken.any()):
            low, high = torch.quantile(gathered[taken], quantiles, dim=0).cpu().bfloat16()
            found[f"{name}.low"], found[f"{name}.high"] = low.clone(), high.clone()
        counted = torch.bincount(codes[own].flatten().long().cpu() - ESCAPE_MIN, minlength=CODE_BINS)
        found[f"{name}.codes"] = processes.reduce(counted, "SUM")
    return found


def _ranges(name: str, seen: ChannelStatistics, channels: Tensor) -> dict[str, Tensor]:
    """What is kept of a row's statistics."""
    return {
        f"{name}.minimum": seen.minimum.cpu()[channels].bfloat16(),
        f"{name}.maximum": seen.maximum.cpu()[channels].bfloat16(),
        f"{name}.dispersion": dispersion_score(seen).cpu().bfloat16(),
    }


def kept_channels(dispersion: Tensor) -> Tensor:
    """Indices of the channels to keep, int64, ascending, from the dispersion of all [K]."""
    in_features = dispersion.numel()
    most = dispersion.argsort(descending=True, stable=True)[:MOST_DISPERSED]
    spaced = torch.linspace(0, in_features - 1, min(EVENLY_SPACED, in_features)).round().long()
    return torch.cat((most, spaced)).unique()


def write_distributions(directory: Path, distributions: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the records, by input name, into a checkpoint directory."""
    path = directory / DISTRIBUTIONS_FILE
    path.parent.mkdir(exist_ok=True)
    save_file({f"{name}.{key}": value for name, found in distributions.items() for key, value in found.items()}, path)


def read_distributions(directory: Path, spec: QuantizationSpec) -> dict[str, dict[str, Tensor]]:
    """The records of a checkpoint by input name; empty where its calibration kept none.

    Raises MorphoQuantError, naming the tensor, where the file is damaged.
    """
    path = directory / DISTRIBUTIONS_FILE
    if not path.exists() and not path.is_symlink():
        return {}
    kinds = (*_RANGES, "dispersion", "codes")
    known = ("channels", *(f"{row}.{kind}" for row in spec.rows for kind in kinds))
    found: dict[str, dict[str, Tensor]] = {}
    with open_file(path) as file:
        names = set(file.keys())
        for shared_input, layers in spec.shared_inputs().items():
            keys = [key for key in known if f"{shared_input}.{key}" in names]
            if any(name.startswith(f"{shared_input}.") for name in names):
                record = {key: file.get_tensor(f"{shared_input}.{key}") for key in keys}
                _check_record(f"{path}: {shared_input}", record, spec.rows, spec.layers[layers[0]].in_features)
                found[shared_input] = record
    return found


def _check_record(what: str, record: Mapping[str, Tensor], rows: Sequence[str], in_features: int) -> None:
    """Refuse a record that is not as `observe` describes; `what` begins the error's line."""
    present = [row for row in rows if f"{row}.dispersion" in record]
    if not present:
        raise MorphoQuantError(f"{what} has a dispersion of none of the rows {list(rows)}; {_AGAIN}")
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    kept = record["channels"].shape if "channels" in record else ()
    shapes["channels"] = (torch.int32, (int(kept[0]) if len(kept) == 1 and kept[0] else 1,))
    for row in present:
        shapes |= {f"{row}.{kind}": (torch.bfloat16, shapes["channels"][1]) for kind in _RANGES}
        shapes |= {f"{row}.dispersion": (torch.bfloat16, (in_features,)), f"{row}.codes": (torch.int64, (CODE_BINS,))}
    for key, (dtype, shape) in shapes.items():
        tensor = record.get(key)
        if tensor is None:
            if key.endswith(_MAY_BE_MISSING):
                continue
            raise MorphoQuantError(f"{what}.{key} is missing; {_AGAIN}")
        if tensor.dtype != dtype or tensor.shape != shape:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise MorphoQuantError(f"{what}.{key} is {got}, expected {dtype} {list(shape)}; {_AGAIN}")
        if not bool(tensor.isfinite().all()):
            raise MorphoQuantError(f"{what}.{key} holds NaN or infinite values; {_AGAIN}")
        if key.endswith("codes") and not 0 <= int(tensor.min()) <= int(tensor.max()) <= _LARGEST_COUNT:
            raise MorphoQuantError(f"{what}.{key} holds a number that is no count; {_AGAIN}")
    channels = record["channels"]
    if int(channels[0]) < 0 or int(channels[-1]) >= in_features or bool((channels.diff() <= 0).any()):
        raise MorphoQuantError(f"{what}.channels must be channels of {in_features}, ascending; {_AGAIN}")
