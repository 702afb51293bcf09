"""What `morphoquant doctor --model` says of a 16-bit model: the memory that its calibration takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.settings.recipe import Recipe
from morphoquant_vllm.doctor.finding import Finding, note, ok
from morphoquant_vllm.errors import MorphoQuantError, missing_package, one_line

if TYPE_CHECKING:
    from calibration.blocks.memory_need import MemoryNeed


def calibrating(directory: Path) -> Iterator[Finding]:
    """The memory need of a calibration with the default settings against the free memory; no weights are loaded."""
    subject, name = "calibration", one_line(directory.resolve().name)
    try:
        need, free = _need_and_free(directory)
    except ModuleNotFoundError as error:
        yield note(subject, f"{name} cannot be calibrated here", missing_package(error.name, "calibration"))
        return
    except MorphoQuantError as error:
        reason, _, remedy = str(error).rpartition("; ")
        yield note(subject, f"{name} cannot be calibrated: {reason or remedy}", remedy if reason else "")
        return
    text = f"{name} takes up to {need.least / 2**30:.2f} GiB without hidden states, {free / 2**30:.2f} GiB are free"
    if need.least <= free:
        yield ok(subject, text)
    else:
        yield note(subject, text, f"calibrate with {need.remedy}")


def _need_and_free(directory: Path) -> tuple[MemoryNeed, int]:
    """What the calibration takes, and the bytes that are free."""
    # Imported here: they need the extra `calibration`.
    from calibration.blocks.memory_need import planned_need
    from calibration.calibrate import plan_job
    from calibration.processes import ONE

    recipe = Recipe()
    job = plan_job(directory, recipe, None, ONE)
    need = planned_need(job.architecture, job.source.tensors, job.names, job.spec, recipe)
    return need, job.memory_limit
