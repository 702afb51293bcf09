"""Replays a golden file: compares the torch reference with recorded outputs of the authors' activation quantizer.

Usage: python -m morphoquant_vllm.numerics.golden FILE
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics import reference
from morphoquant_vllm.numerics.statistics import ChannelStatistics

CALIBRATION_BATCHES, SEARCH_BATCHES, INFERENCE_BATCH = (0, 1, 2), (1, 2), 4
# Ranges, masks and outputs must be equal. The dispersion adds up in another order than the authors' code.
RELATIVE_TOLERANCE = {"dispersion": 1e-5}


@dataclass(frozen=True)
class Difference:
    """The difference between one replayed tensor and the recorded one."""

    case: int
    layer: str
    tensor: str
    largest: float
    elements: int
    within: bool


def replay_case(settings: dict[str, Any], batches: list[Tensor]) -> dict[str, Tensor]:
    """Run steps 1-7 of the reference algorithm by the file's protocol; the keys are the file's."""
    statistics = ChannelStatistics.of(batches[0])
    for index in CALIBRATION_BATCHES[1:]:
        statistics = statistics.merge(ChannelStatistics.of(batches[index]))
    dispersion = reference.dispersion_score(statistics)
    mask = reference.outlier_mask(dispersion, settings["std"])
    if settings["full_mask"]:
        mask = torch.ones_like(mask)
    low, high = reference.base_range(statistics.minimum, statistics.maximum, mask)
    lower, lam = settings["lower"], settings["sparse_buffer_ratio"]
    scores = None
    for index in SEARCH_BATCHES:
        batch_scores = reference.search_scores(
            batches[index],
            low,
            high,
            mask,
            lower=lower,
            lam=lam,
            lp_norm=settings["lp_norm"],
            cosine_weight=settings["gamma_cos"] if settings["cosine"] else None,
        )
        scores = reference.merge_scores(scores, batch_scores)
    assert scores is not None
    ratio = reference.best_ratio(scores, lower)
    range_min, range_max = ratio * low, ratio * high
    return {
        "calib_min": statistics.minimum,
        "calib_max": statistics.maximum,
        "dispersion": dispersion,
        "mask": mask,
        "range_min": range_min,
        "range_max": range_max,
        "limit": reference.escape_limit(range_min, range_max, lam),
        "output": reference.exact_quantize(batches[INFERENCE_BATCH], range_min, range_max, mask, lam),
    }


def compare(case: int, layer: str, tensor: str, ours: Tensor, recorded: Tensor) -> Difference:
    """Measure `ours` against `recorded` (shapes must agree)."""
    if ours.shape != recorded.shape:
        raise MorphoQuantError(
            f"golden case {case}: {tensor} has shape {list(recorded.shape)}, expected {list(ours.shape)}"
        )
    ours, recorded = ours.double(), recorded.double()
    gap = (ours - recorded).abs()
    gap = torch.where(gap.isnan(), torch.inf, gap)
    bound = RELATIVE_TOLERANCE.get(tensor, 0.0) * recorded.abs()
    wrong = ~(gap <= bound)  # a recorded NaN makes the bound NaN: wrong too
    return Difference(case, layer, tensor, float(gap.max()), int(wrong.sum()), not bool(wrong.any()))


def replay_file(path: Path | str) -> list[Difference]:
    """Replay every case of a golden file; raises MorphoQuantError if the file cannot be read as one."""
    differences = []
    try:
        with safe_open(str(path), "pt") as file:
            for settings in json.loads(file.metadata()["meta"])["cases"]:
                case, layer = settings["id"], settings["name"]
                batches = [file.get_tensor(f"{layer}.x{index}") for index in range(INFERENCE_BATCH + 1)]
                for tensor, ours in replay_case(settings, batches).items():
                    recorded = file.get_tensor(f"{case}.{tensor}")
                    differences.append(compare(case, layer, tensor, ours, recorded))
    # RuntimeError and ValueError: inputs of unlike shapes, or metadata that is not JSON.
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise MorphoQuantError(f"{path}: not a golden file ({reason})") from error
    if not differences:
        raise MorphoQuantError(f"{path}: not a golden file (its metadata lists no case)")
    return differences


def main(arguments: list[str]) -> int:
    """Print the table of differences; 0 if all tensors agree, 1 if any differs, 2 for a bad file."""
    if len(arguments) != 1:
        print("usage: python -m morphoquant_vllm.numerics.golden FILE", file=sys.stderr)
        return 2
    try:
        differences = replay_file(arguments[0])
    except MorphoQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in differences:
        verdict = "equal" if row.within else f"{row.elements} elements DIFFER"
        print(f"case {row.case} {row.layer:32} {row.tensor:12} largest difference {row.largest:.3g}  {verdict}")
    failed = [row for row in differences if not row.within]
    if failed:
        worst = max(failed, key=lambda row: row.largest)
        print(
            f"FAILED: {len(failed)} of {len(differences)} tensors differ; "
            f"largest difference {worst.largest:.6g} in case {worst.case} {worst.tensor}"
        )
        return 1
    print(f"all {len(differences)} tensors of {len({row.case for row in differences})} cases agree")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
