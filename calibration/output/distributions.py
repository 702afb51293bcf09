"""The kept distribution of each input, for `morphoquant report`: a small file beside the weights.

It lies in a subfolder, since loaders take every safetensors file in the main folder for weights. Serving does not read
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.output.weight_file import write_weights
from calibration.quantize.layer import DrawnInput
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import open_file
from morphoquant_vllm.format.layers import INPUT_TENSORS, experts_input
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import ESCAPE_MAX, ESCAPE_MIN, act_quant, activation_record, token_rows
from morphoquant_vllm.numerics.reference import dispersion_score
from morphoquant_vllm.numerics.statistics import ChannelStatistics

DISTRIBUTIONS_FILE = "morphoquant_calibration/distributions.safetensors"
# Channels whose ranges are kept: this many of the most dispersed, and as many evenly spaced ones.
MOST_DISPERSED = 128
EVENLY_SPACED = 128
# Drawn tokens for quantiles and counts of codes.
TOKENS = 2048
# The inner range of a channel.
QUANTILES = (0.01, 0.99)
CODE_BINS = ESCAPE_MAX - ESCAPE_MIN + 1
# Tensors [kept] of a row; the inner range is kept only if tokens of the row were drawn.
_RANGES = ("minimum", "maximum", "low", "high")
_MAY_BE_MISSING = (".low", ".high")
# The sum of 256 counts up to this fits int64.
_LARGEST_COUNT = 2**53
_AGAIN = "copy it from the original checkpoint, or calibrate again"


def observe(
    inputs: DrawnInput, tokens: DrawnTokens, tensors: Mapping[str, Tensor], spec: QuantizationSpec
) -> dict[str, Tensor]:
    """The distribution of one input. `<row>` is a modality's name or "massive", only if it had tokens.

        channels                    int32 [kept], the kept channels, ascending
        <row>.minimum, .maximum     bfloat16 [kept], over all tokens
        <row>.low, .high            bfloat16 [kept], the 1 % and 99 % quantiles over drawn tokens
        <row>.dispersion            bfloat16 [K], over all tokens
        <row>.codes                 int64 [256], counts of each served code of drawn tokens, -128 first

    `tensors` are those of a quantized layer with that input.
    """
    statistics = inputs.observation.statistics
    x, processes = inputs.observation.drawn, tokens.processes
    stride = max(1, tokens.modality.numel() // TOKENS)
    modality = tokens.modality[::stride].to(x.device)
    x, own_modality = tokens.every(x, stride), tokens.every(tokens.local(tokens.modality), stride).to(x.device)
    record = activation_record(*(tensors[name].to(x.device) for name in INPUT_TENSORS))
    own_rows = token_rows(x, own_modality, record)
    codes = act_quant(x, own_rows, record)
    pooled = reduce(ChannelStatistics.merge, statistics.values())
    channels = processes.broadcast(lambda: kept_channels(dispersion_score(pooled).cpu()))
    distribution = {"channels": channels.int()}
    owners = tokens.token_owners[::stride]
    rows, gathered = (processes.all_gather_rows(part, owners) for part in (own_rows, x[:, channels.to(x.device)]))
    massive_row = len(spec.rows) - 1
    # In the statistics, the block's residual stream decides which tokens are massive; among drawn tokens, the
    # quantizer's intervals do.
    for row, seen in statistics.items():
        name = spec.rows[row]
        distribution |= _ranges(name, seen, channels)
        taken, of_row = (
            served == massive_row if row == massive_row else (of == row) & (served != massive_row)
            for served, of in ((rows, modality), (own_rows, own_modality))
        )
        if bool(taken.any()):
            distribution |= _inner_range(name, gathered[taken])
        counted = torch.bincount(codes[of_row].flatten().long().cpu() - ESCAPE_MIN, minlength=CODE_BINS)
        distribution[f"{name}.codes"] = processes.all_reduce(counted, "SUM")
    return distribution


def _ranges(name: str, seen: ChannelStatistics, channels: Tensor) -> dict[str, Tensor]:
    """The kept ranges of a row's statistics."""
    return {
        f"{name}.minimum": seen.minimum.cpu()[channels].bfloat16(),
        f"{name}.maximum": seen.maximum.cpu()[channels].bfloat16(),
        f"{name}.dispersion": dispersion_score(seen).cpu().bfloat16(),
    }


def _inner_range(name: str, values: Tensor) -> dict[str, Tensor]:
    """The kept quantiles of the drawn tokens [drawn, kept] of a row."""
    quantiles = torch.tensor(QUANTILES, device=values.device)
    low, high = torch.quantile(values, quantiles, dim=0).cpu().bfloat16()
    return {f"{name}.low": low.clone(), f"{name}.high": high.clone()}


def kept_channels(dispersion: Tensor) -> Tensor:
    """Indices of the channels to keep, int64, ascending, from the dispersion of all [K]."""
    in_features = dispersion.numel()
    most = dispersion.argsort(descending=True, stable=True)[:MOST_DISPERSED]
    spaced = torch.linspace(0, in_features - 1, min(EVENLY_SPACED, in_features)).round().long()
    return torch.cat((most, spaced)).unique()


def write_distributions(directory: Path, distributions: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the distributions, by input name, into a checkpoint directory."""
    path = directory / DISTRIBUTIONS_FILE
    path.parent.mkdir(exist_ok=True)
    write_weights(
        path,
        {f"{name}.{key}": value for name, distribution in distributions.items() for key, value in distribution.items()},
    )


def read_distributions(directory: Path, spec: QuantizationSpec) -> dict[str, dict[str, Tensor]]:
    """The distributions of a checkpoint by input name; empty if its calibration kept none.

    Raises MorphoQuantError naming the tensor if the file is damaged.
    """
    path = directory / DISTRIBUTIONS_FILE
    if not path.exists() and not path.is_symlink():
        return {}
    kinds = (*_RANGES, "dispersion", "codes")
    known = ("channels", *(f"{row}.{kind}" for row in spec.rows for kind in kinds))
    distributions: dict[str, dict[str, Tensor]] = {}
    with open_file(path) as file:
        names = set(file.keys())
        for shared_input, in_features in _widths(spec).items():
            keys = [key for key in known if f"{shared_input}.{key}" in names]
            if any(name.startswith(f"{shared_input}.") for name in names):
                distribution = {key: file.get_tensor(f"{shared_input}.{key}") for key in keys}
                _check_distribution(f"{path}: {shared_input}", distribution, spec.rows, in_features)
                distributions[shared_input] = distribution
    return distributions


def _widths(spec: QuantizationSpec) -> dict[str, int]:
    """K by the name of each input whose distribution is kept: of an expert's down_proj it is not."""
    widths = {name: spec.layers[layers[0]].in_features for name, layers in spec.shared_inputs().items()}
    return widths | {experts_input(name): settings.in_features for name, settings in spec.experts.items()}


def _check_distribution(name: str, distribution: Mapping[str, Tensor], rows: Sequence[str], in_features: int) -> None:
    """Refuse a distribution that does not have the form of `observe`; `name` begins the error's line."""
    present = [row for row in rows if f"{row}.dispersion" in distribution]
    if not present:
        raise MorphoQuantError(f"{name} lacks a dispersion of any of the rows {list(rows)}; {_AGAIN}")
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    kept = distribution["channels"].shape if "channels" in distribution else ()
    shapes["channels"] = (torch.int32, (int(kept[0]) if len(kept) == 1 and kept[0] else 1,))
    for row in present:
        shapes |= {f"{row}.{kind}": (torch.bfloat16, shapes["channels"][1]) for kind in _RANGES}
        shapes |= {f"{row}.dispersion": (torch.bfloat16, (in_features,)), f"{row}.codes": (torch.int64, (CODE_BINS,))}
    for key, (dtype, shape) in shapes.items():
        tensor = distribution.get(key)
        if tensor is None:
            if key.endswith(_MAY_BE_MISSING):
                continue
            raise MorphoQuantError(f"{name}.{key} is missing; {_AGAIN}")
        if tensor.dtype != dtype or tensor.shape != shape:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise MorphoQuantError(f"{name}.{key} is {got}, expected {dtype} {list(shape)}; {_AGAIN}")
        if not bool(tensor.isfinite().all()):
            raise MorphoQuantError(f"{name}.{key} holds NaN or infinite values; {_AGAIN}")
        if key.endswith("codes") and not 0 <= int(tensor.min()) <= int(tensor.max()) <= _LARGEST_COUNT:
            raise MorphoQuantError(f"{name}.{key} holds a number that is not a count; {_AGAIN}")
    channels = distribution["channels"]
    if int(channels[0]) < 0 or int(channels[-1]) >= in_features or bool((channels.diff() <= 0).any()):
        raise MorphoQuantError(f"{name}.channels must be channels of {in_features}, ascending; {_AGAIN}")
