"""Gathers the page's content from a checkpoint directory; it loads no model and draws nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.model.plan import matches
from calibration.output.distributions import read_distributions
from calibration.output.inspection import inspect_data
from calibration.output.report_file import Report, read_report
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import check_headers, load_input, read_spec
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.layers import experts_input, input_holder
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.reference import outlier_mask

# Number of inputs that are drawn channel by channel if none is named.
CHOSEN = 6


@dataclass(frozen=True)
class Input:
    """One linear input: its distribution and its grid."""

    name: str
    # Linears that read the input.
    layers: tuple[str, ...]
    # In the form of `calibration.output.distributions.observe`.
    distribution: dict[str, Tensor]
    # The checkpoint's INPUT_TENSORS; filled for inputs that are drawn channel by channel.
    grid: dict[str, Tensor]
    output_error: float | None
    escape_rate: dict[str, float]

    def rows(self, known: Sequence[str]) -> list[str]:
        """Rows of `known` that had tokens, in their order."""
        return [row for row in known if f"{row}.dispersion" in self.distribution]

    def dispersed_channels(self, row: str) -> int:
        """Channels that the reference's rule (mean + 2 deviations) would let escape in a row."""
        return int(outlier_mask(self.distribution[f"{row}.dispersion"].float()).sum())


@dataclass(frozen=True)
class Content:
    """Everything on the page."""

    name: str
    spec: QuantizationSpec
    # Result of `inspect_data`.
    inspected: dict[str, Any]
    report: Report
    inputs: tuple[Input, ...]
    chosen: tuple[Input, ...]


def gather(directory: Path, patterns: Sequence[str] = ()) -> Content:
    """Gather the page of a checkpoint; `patterns` choose the layers whose inputs are drawn channel by channel.

    Raises MorphoQuantError if the directory is not a MorphoQuant checkpoint, or if no layer matches. So do a missing or
    damaged calibration report, and damaged distributions.
    """
    inspected = inspect_data(directory)
    spec = read_spec(directory)
    report = read_report(directory)
    if report is None:
        raise MorphoQuantError(
            f"{directory / REPORT_FILE}: missing, so there is nothing to report; copy it from the original checkpoint"
        )
    distributions = read_distributions(directory, spec)
    measured = {layer["name"]: layer for layer in inspected["layers"]}
    measured |= {input_holder(entry["name"]): entry for entry in inspected["experts"]}
    layers_of = spec.shared_inputs() | {experts_input(name): [input_holder(name)] for name in spec.experts}
    inputs = tuple(_input(name, layers, distributions.get(name, {}), measured) for name, layers in layers_of.items())
    files = check_headers(directory, spec)
    chosen = []
    for entry in _choose([entry for entry in inputs if entry.distribution], patterns):
        grid = load_input(directory, files, entry.layers[0])
        chosen.append(Input(entry.name, entry.layers, entry.distribution, grid, entry.output_error, entry.escape_rate))
    if patterns and not any(
        matches(name, tuple(patterns)) for name in (*spec.layers, *layers_of, *map(input_holder, spec.experts))
    ):
        raise MorphoQuantError(f"--layer {' '.join(patterns)!r} matches no layer; `morphoquant inspect` lists them")
    return Content(Path(os.path.realpath(directory)).name, spec, inspected, report, inputs, tuple(chosen))


def _input(
    name: str, layers: Sequence[str], distribution: dict[str, Tensor], measured: Mapping[str, Mapping[str, Any]]
) -> Input:
    errors = [measured[layer]["output_error"] for layer in layers]
    known = [error for error in errors if error is not None]
    rates = measured[layers[0]]["escape_rate"] or {}
    return Input(name, tuple(layers), distribution, {}, max(known) if known else None, rates)


def _choose(inputs: Sequence[Input], patterns: Sequence[str]) -> list[Input]:
    """The inputs that match; without patterns, the first and last, and those with the largest error or escape rate."""
    if patterns:
        chosen = tuple(patterns)
        return [entry for entry in inputs if any(matches(name, chosen) for name in (entry.name, *entry.layers))]
    wanted = {entry.name for entry in (*inputs[:1], *inputs[-1:])}
    by_error = sorted(inputs, key=lambda entry: -(entry.output_error or 0.0))
    by_escapes = sorted(inputs, key=lambda entry: -entry.escape_rate.get("all", 0.0))
    for pair in zip(by_error, by_escapes, strict=True):
        for entry in pair:
            if len(wanted) < CHOSEN:
                wanted.add(entry.name)
    return [entry for entry in inputs if entry.name in wanted]
