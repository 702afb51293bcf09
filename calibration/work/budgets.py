"""The part of a work directory about what a run decides before its blocks: samples, choice, metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.quantize.output_metric import with_metric
from calibration.work.directory import SAMPLES_FILE, WorkDirectory
from calibration.work.durable_files import (
    FileRecord,
    check_file,
    damaged,
    read_manifest,
    read_tensors,
    write_json_durably,
    write_tensors_durably,
)
from morphoquant_vllm.format.layers import LayerSpec

BUDGETS_FILE = "budgets.json"


@dataclass(frozen=True)
class Choice:
    """What a run decides before its blocks. The form of each input's linears by its name: 4, 8 or 16 bits."""

    forms: dict[str, int]
    # The mean bits of a weight.
    mean: float
    # Share of each input in the estimated error of the model with 4-bit weights alone.
    shares: dict[str, float]
    # The escape budget of each input, if they differ.
    escape_budgets: dict[str, float] = field(default_factory=dict)
    # Whether steps and scales learn after the blocks.
    learns: bool = False
    # The files of the metrics of outputs, by name: as in durable_files.FileRecord.
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_choice(work: WorkDirectory) -> Choice | None:
    """The choice that the run has made; None if it has not. MorphoQuantError if blocks were finished without it."""
    path = work.path / BUDGETS_FILE
    if not path.exists():
        if work.finished:
            raise damaged(path, "it is missing")
        return None
    content = read_manifest(path)
    if content.pop("settings", None) != work.run_hash:
        raise damaged(path, "it belongs to another run")
    return Choice(**content)


def keep_choice(work: WorkDirectory, choice: Choice) -> None:
    """Keep the choice for the later blocks and for a resumed run."""
    write_json_durably(work.path / BUDGETS_FILE, {"settings": work.run_hash, **asdict(choice)})


def keep_metrics(work: WorkDirectory, block: int, metrics: Mapping[str, Tensor]) -> FileRecord:
    """Keep the metrics of outputs of a block's layers, in bfloat16: its errors are far below the damping."""
    tensors = {name: metric.to("cpu", torch.bfloat16) for name, metric in metrics.items()}
    return write_tensors_durably(metrics_file(work.path, block), tensors)


def read_metrics(work: WorkDirectory, files: Mapping[str, Mapping[str, Any]], block: int) -> dict[str, Tensor]:
    """The metrics of outputs of a block's layers, bfloat16 [N, N] by name; none if the choice's `files` have none.

    MorphoQuantError if the file is not as it was written.
    """
    path = metrics_file(work.path, block)
    if path.name not in files:
        return {}
    check_file(path, FileRecord(**files[path.name]))
    return read_tensors(path)


def metrics_bytes(layers: Mapping[str, LayerSpec]) -> int:
    """Bytes of the metrics of all these layers, by name, on disk."""
    return sum(layer.out_features**2 * torch.bfloat16.itemsize for layer in with_metric(layers).values())


def metrics_file(directory: Path, block: int) -> Path:
    """The file of the metrics of outputs of a block's layers."""
    return directory / f"metrics-{block:05}.safetensors"


def sample_lengths(work: WorkDirectory) -> list[int]:
    """Number of tokens of every sample, also those of other processes."""
    samples = read_manifest(work.path / SAMPLES_FILE)["samples"]
    return [math.prod(sample["states"][:-1]) for sample in samples]


def report_entry(work: WorkDirectory, budget: float) -> Mapping[str, object]:
    """What the report says of the choice; inputs of 4-bit weights are not listed."""
    choice = read_choice(work)
    assert choice is not None
    of_form = {form: [name for name, found in choice.forms.items() if found == form] for form in (8, 16)}
    return {"budget": budget, "mean": choice.mean, "eight_bit": of_form[8], "sixteen_bit": of_form[16]}
