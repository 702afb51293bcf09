"""One run of learning, on the process that learns: its samples, targets, updates and judgements, kept as it goes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.forecast import duration
from calibration.job import Job
from calibration.learn.changes import no_changes
from calibration.learn.descent import Descent, Judgement
from calibration.learn.extent import EXTENTS, Chosen
from calibration.learn.head import Head
from calibration.learn.model import Kept, LearningDecoder
from calibration.learn.targets import Objective, Pass16Bit, Target, counted_tokens
from calibration.model.block_loader import BlockLoader
from calibration.work.directory import WorkDirectory
from calibration.work.hidden_states import read_sample
from calibration.work.learned import STATE, TARGETS, keep_learned, keep_part, read_part
from morphoquant_vllm.format.schema import TEXT_ROW

logger = logging.getLogger(__name__)

# An interrupted run repeats at most as many updates.
UPDATES_KEPT = 8


@dataclass
class Judgements:
    """What judging samples said: at the start, the least divergence, and the changes that had it."""

    start: Judgement
    least: float
    # None while none had a smaller divergence than the start.
    best: dict[str, Tensor] | None


class LearningRun:
    """Learning from the samples `chosen`."""

    def __init__(self, job: Job, work: WorkDirectory, chosen: Chosen, memory: Kept) -> None:
        self.job, self.work, self.chosen, self.memory = job, work, chosen, memory
        self.blocks = BlockLoader(job.architecture, job.source, job.names, job.recipe, job.device)
        self.samples = sorted({*chosen.learned, *chosen.judging})
        self.targets = read_part(work, TARGETS)
        self._pass: Pass16Bit | None = None
        self._aim: Objective | None = None
        self._descent: Descent | None = None
        self._judgements: Judgements | None = None
        # The first update of this run, and the seconds of a clock before it.
        self._first, self._began = 0, 0.0

    def blocks_to_pass(self) -> int:
        """The number of blocks through which the targets still have to be carried: all or none."""
        return self.job.names.blocks if self.targets is None else 0

    def find_targets(self, block: int) -> None:
        """Carry the samples through a block of the 16-bit model, and keep the targets after the last one."""
        if self._pass is None:
            samples = [read_sample(self.work.path, index, self.work.device) for index in self.samples]
            self._pass = Pass16Bit(self.blocks, self._layers_of, samples)
        self._pass.forward(block)
        if block < self.job.names.blocks - 1:
            return
        found, text = self._pass, self.job.spec.rows.index(TEXT_ROW)
        tensors = {f"size {layer}": torch.tensor([size]) for layer, size in found.sizes.items()}
        for place, index in enumerate(self.samples):
            counted = counted_tokens(found.samples[place].modality, found.massive[place], text)
            states = self._objective().head.normed(found.states[place][0]).cpu()
            tensors |= {f"states {index}": states, f"counted {index}": counted}
        keep_part(self.work, TARGETS, tensors)
        self.targets, self._pass = tensors, None

    def begin(self) -> tuple[int, int]:
        """The next update, and the number of all updates; the first judgement if the run has none."""
        self._first, updates = self._restored()
        self._began = time.monotonic()
        start = self._parts()[1].start.divergence
        if not math.isfinite(start):
            logger.warning(
                "learning: the divergence of judging samples is %s at the start, so no update is made", start
            )
            return updates, updates
        return self._first, updates

    def _restored(self) -> tuple[int, int]:
        assert self.targets is not None
        sizes = {name.removeprefix("size "): float(value) for name, value in self._sizes().items()}
        layers = {layer: self.job.spec.layers[layer] for layer in sizes}
        changes = no_changes(layers, sizes, self.job.device)
        decoder = LearningDecoder(self.blocks, self._layers_of, self.work.tensor, self.job.spec, changes, self.memory)
        extent = EXTENTS[self.job.recipe.effort]
        self._descent = Descent(decoder, self._objective(), self.chosen, self._read, self.job.recipe.seed, extent)
        state = read_part(self.work, STATE)
        if state is None:
            start = self._descent.judge()
            self._judgements = Judgements(start, start.divergence, None)
            return 0, self._descent.updates
        best = {name.removeprefix("best "): value for name, value in state.items() if name.startswith("best ")}
        rates = {name.removeprefix("rate "): float(value) for name, value in state.items() if name.startswith("rate ")}
        self._judgements = Judgements(Judgement(float(state["start"]), rates), float(state["least"]), best or None)
        self._descent.restore(state)
        return int(state["done"]), self._descent.updates

    def update(self, index: int) -> None:
        """Make an update."""
        self._parts()[0].update(index)

    def is_judged(self, index: int) -> bool:
        """Whether the judging samples judge after an update."""
        return self._parts()[0].is_judged(index)

    def keep_escape_rates(self) -> None:
        """Bring the rates of escapes of judging samples back to those of the start."""
        descent, judgements = self._parts()
        descent.keep_escape_rates(judgements.start.escape_rates, descent.judge().escape_rates)

    def judge(self, what: str) -> None:
        """Note the changes if judging samples diverge least with them so far; `what` names them in the log."""
        descent, judgements = self._parts()
        error = descent.judge().divergence
        logger.info(
            "learning: %s, divergence of judging samples %.5f, at the start %.5f",
            *(what, error, judgements.start.divergence),
        )
        if error < judgements.least:
            judgements.least, judgements.best = error, descent.learned()

    def keep_state(self, index: int) -> None:
        """Keep the state after an update if it is time."""
        descent, judgements = self._parts()
        if (index + 1) % UPDATES_KEPT:
            return
        figures = {"done": index + 1, "start": judgements.start.divergence, "least": judgements.least}
        figures |= {f"rate {name}": rate for name, rate in judgements.start.escape_rates.items()}
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
        state |= {f"best {name}": value for name, value in (judgements.best or {}).items()}
        keep_part(self.work, STATE, descent.state() | state)
        each = (time.monotonic() - self._began) / (index + 1 - self._first)
        left = duration(each * (descent.updates - index - 1))
        logger.info("learning: update %d of %d, about %s left", index + 1, descent.updates, left)

    def take_mean(self) -> None:
        """Take the mean of the later updates in place of the last one."""
        self._parts()[0].take_mean()

    def finish(self) -> None:
        """Keep the changes with the least divergence of judging samples: of an update, of the mean, or none."""
        descent, found = self._parts()
        if found.best is None:
            logger.warning(
                "learning: the divergence of judging samples did not fall (%.5f at the start), so nothing is changed; "
                "more samples may help",
                found.start.divergence,
            )
        figures = {
            "samples": len(self.chosen.learned),
            "judging_samples": len(self.chosen.judging),
            "steps": descent.updates,
            "divergence_before": found.start.divergence,
            "divergence_after": found.least,
        }
        # JSON has no number that is not finite.
        finite: dict[str, float | None] = {
            name: value if math.isfinite(value) else None for name, value in figures.items()
        }
        changes = found.best
        if changes is None:
            changes = {name: torch.zeros_like(value) for name, value in descent.learned().items()}
        keep_learned(self.work, changes | self._sizes(), finite)

    def _parts(self) -> tuple[Descent, Judgements]:
        """The descent and the judgements, which `begin` makes."""
        assert self._descent is not None and self._judgements is not None
        return self._descent, self._judgements

    def _objective(self) -> Objective:
        if self._aim is None:
            job = self.job
            self._aim = Objective(Head(job.architecture, job.names, job.source, job.recipe, job.device))
        return self._aim

    def _sizes(self) -> dict[str, Tensor]:
        assert self.targets is not None
        return {name: value for name, value in self.targets.items() if name.startswith("size ")}

    def _read(self, sample: int) -> tuple[MemoryInput, Target]:
        assert self.targets is not None
        target = Target(self.targets[f"states {sample}"], self.targets[f"counted {sample}"])
        return read_sample(self.work.path, sample, self.work.device), target

    def _layers_of(self, block: int) -> Mapping[str, str]:
        """The quantized linears of a block: names in the checkpoint by names in the block."""
        start = self.job.names.layer(block, "")
        return {layer.removeprefix(start): layer for layer in self.job.spec.layers if layer.startswith(start)}
