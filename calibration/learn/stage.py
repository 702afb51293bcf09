"""The stage of a calibration that learns from the decoder's last states. The first process learns, the others wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from calibration.job import Job
from calibration.learn.extent import EXTENTS, LEAST_TOKENS, LONGEST, Chosen, choose_samples
from calibration.learn.head import has_head
from calibration.learn.need import decoder_bytes, learning_bytes
from calibration.learn.run import LearningRun
from calibration.model.head_tensor import head_tensor
from calibration.quantize.held_out import SAMPLES_PER_HELD
from calibration.work.budgets import sample_lengths
from calibration.work.directory import WorkDirectory
from calibration.work.learned import read_figures

logger = logging.getLogger(__name__)

T = TypeVar("T")


def learn(job: Job, work: WorkDirectory) -> None:
    """Learn as much as the recipe's effort says, and keep the result, unless the run has done so already."""
    processes = job.processes
    if job.recipe.effort not in EXTENTS or processes.broadcast(lambda: read_figures(work) is not None):
        return
    run = _plan(job, work) if processes.first else None
    if not processes.broadcast(lambda: run is not None):
        return

    def on_first(action: Callable[[LearningRun], T]) -> T:
        def act() -> T:
            assert run is not None
            return action(run)

        return processes.broadcast(act)

    for block in range(on_first(LearningRun.blocks_to_pass)):
        on_first(partial(LearningRun.find_targets, block=block))
    done, steps = on_first(LearningRun.begin)
    for index in range(done, steps):
        on_first(partial(LearningRun.step, index=index))
    on_first(LearningRun.finish)


def obstacle(job: Job, lengths: Sequence[int]) -> str | None:
    """Why steps and scales cannot learn from samples of these numbers of tokens; None if they can, with the memory."""
    effort = job.recipe.effort
    if any(name.startswith(f"{job.names.prefix}.") for name in job.spec.experts):
        return "the decoder has experts, which cannot learn"
    if not has_head(job.architecture, job.source, job.recipe):
        return "the model has no head that writes text"
    if choose_samples(lengths, effort) is None:
        every = SAMPLES_PER_HELD[effort]
        return f"give {every} samples or more, with {LEAST_TOKENS} tokens in those of at most {LONGEST}"
    return None


def _plan(job: Job, work: WorkDirectory) -> LearningRun | None:
    """The run of learning; None, with a line that says why, if steps and scales cannot learn."""
    lengths = sample_lengths(work)
    effort = job.recipe.effort
    reason = obstacle(job, lengths)
    if reason is None:
        chosen = choose_samples(lengths, effort)
        assert chosen is not None
        kept, streamed = _need(job, lengths, chosen)
        if streamed <= job.device_limit:
            logger.info(
                "learning: steps and scales learn from %d samples, and %d others judge",
                *(len(chosen.learned), len(chosen.judging)),
            )
            return LearningRun(job, work, chosen, keep=kept <= job.device_limit)
        sizes = [f"{size / 2**30:.1f} GiB" for size in (streamed, job.device_limit)]
        reason = f"that needs {sizes[0]} of memory, and {sizes[1]} are free"
    level = logging.WARNING if effort == "best" else logging.INFO
    logger.log(level, "effort %s: steps and scales do not learn: %s", effort, reason)
    return None


def _need(job: Job, lengths: list[int], chosen: Chosen) -> tuple[int, int]:
    """Bytes of learning with all blocks in memory, and with one."""
    layers = [
        [layer for name, layer in job.spec.layers.items() if name.startswith(job.names.layer(index, ""))]
        for index in range(job.names.blocks)
    ]
    samples = [*chosen.learned, *chosen.judging]
    longest, every = max(lengths[index] for index in samples), sum(lengths[index] for index in samples)
    config = job.architecture.decoder_config(job.source.config)
    # The states of one sample before every block, and those of all samples that are targets.
    states = 4 * config["hidden_size"] * (longest * (job.names.blocks + 1) + 2 * every)
    head = job.memory_need().front_streamed + 4 * head_tensor(job.architecture, job.names, job.source.tensors).elements
    streamed = head + learning_bytes(layers, states, longest)
    return streamed + sum(map(decoder_bytes, layers)), streamed
