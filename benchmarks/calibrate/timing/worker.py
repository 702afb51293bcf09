"""The process that calibrates and is measured: it prints its rates and the end of each block to stdout.

Each as one JSON object a line.

python -m benchmarks.calibrate.timing.worker JOB, where JOB is a JSON file with the fields of `Job`.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.calibrate.timing.rates import product_rate
from benchmarks.common.command import one_line_errors
from calibration.blocks.results import BlockResult
from calibration.calibrate import calibrate
from calibration.model.loading import choose_device
from calibration.settings.recipe import read_recipe

ROWS = 25


@dataclass(frozen=True)
class Job:
    """A calibration, its number of cores, the blocks after which it stops, and its bytes of memory (None: no limit)."""

    model: str
    data: list[str]
    output: str
    recipe: dict[str, Any]
    cores: int
    blocks: int | None = None
    memory_budget: int | None = None


class EnoughBlocks(Exception):
    """As many blocks as were asked for are done."""


def say(event: str, **fields: Any) -> None:
    """One line for the process that measures."""
    print(json.dumps({"event": event, "time": time.time(), **fields}), flush=True)


def run(job: Job) -> None:
    """Measure the rates of products, then calibrate, in a profile."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    torch.set_num_threads(job.cores)

    used = 0.0

    def on_block(result: BlockResult) -> None:
        nonlocal used
        before, used = used, time.process_time()
        say("block", index=result.index, count=result.count, loss=result.loss, cpu=used - before)
        if job.blocks is not None and result.index + 1 >= job.blocks < result.count:
            raise EnoughBlocks

    recipe = read_recipe(overrides=job.recipe)
    device = choose_device(recipe.device)
    rates = {
        str(dtype).removeprefix("torch."): product_rate(dtype, device=device)
        for dtype in (torch.bfloat16, torch.float32)
    }
    limits = {} if job.memory_budget is None else {"memory_budget": job.memory_budget}
    profile = cProfile.Profile()
    say("start", rates=rates)
    finished = True
    try:
        profile.runcall(
            calibrate,
            job.model,
            job.data,
            job.output,
            recipe=recipe,
            overwrite=True,
            on_block=on_block,
            **limits,
        )
    except EnoughBlocks:
        finished = False
    # Kilobytes on Linux.
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_gpu = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    say("end", finished=finished, peak=peak, gpu_peak=on_gpu, profile=table(profile))


def table(profile: cProfile.Profile, rows: int = ROWS) -> dict[str, list[dict[str, Any]]]:
    """The functions with most time of their own, and this package's with most time in all."""
    stats: Mapping[tuple[str, int, str], tuple[int, int, float, float, Any]]
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    entries: list[dict[str, Any]] = [
        {"function": _label(place), "calls": calls, "own": own, "cumulative": cumulative}
        for place, (_, calls, own, cumulative, _) in stats.items()
    ]
    ours = [entry for entry in entries if entry["function"].startswith(("calibration.", "morphoquant_vllm."))]
    return {
        "own": sorted(entries, key=lambda entry: -entry["own"])[:rows],
        "cumulative": sorted(ours, key=lambda entry: -entry["cumulative"])[:rows],
    }


def _label(place: tuple[str, int, str]) -> str:
    """package.module.function, or the profiler's name of a built-in function."""
    path, _, function = place
    if path == "~":
        return function.strip("<>{}").removeprefix("built-in ").replace("torch._C.", "")
    parts = Path(path).with_suffix("").parts
    roots = [place for place, part in enumerate(parts) if part in ("calibration", "morphoquant_vllm", "site-packages")]
    if roots:
        parts = parts[roots[-1] + (parts[roots[-1]] == "site-packages") :]
    return ".".join((*parts[-4:], function))


def main() -> None:
    """Run the job that the command line names."""
    # It lists the talker's weights, which calibration only copies, as unexpected.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with one_line_errors():
        run(Job(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
