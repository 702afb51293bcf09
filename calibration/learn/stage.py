"""The stage of a calibration that learns from the decoder's last states. The first process learns, the others wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from calibration.job import Job
from calibration.learn.extent import EXTENTS, LEAST_TOKENS, LONGEST, Chosen, choose_samples
from calibration.learn.head import has_head
from calibration.learn.model import Kept
from calibration.learn.need import decoder_bytes, graph_bytes, learning_bytes
from calibration.learn.run import LearningRun
from calibration.model.head_tensor import head_tensor
from calibration.quantize.held_out import SAMPLES_PER_HELD
from calibration.work.budgets import sample_lengths
from calibration.work.directory import WorkDirectory
from calibration.work.learned import read_figures
from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def learn(job: Job, work: WorkDirectory) -> None:
    """Learn as much as the recipe's effort says, and keep the result, unless the run has done so or does not learn."""
    processes = job.processes
    if not job.learns or processes.broadcast(lambda: read_figures(work) is not None):
        return
    # Only the first process has a run: the others never call an action, so their list stays empty.
    runs: list[LearningRun] = []

    def on_first(action: Callable[[LearningRun], T]) -> T:
        return processes.broadcast(lambda: action(runs[0]))

    processes.broadcast(lambda: runs.append(_planned(job, work)))
    for block in range(on_first(LearningRun.blocks_to_pass)):
        on_first(partial(LearningRun.find_targets, block=block))
    done, updates = on_first(LearningRun.begin)
    # Other processes wait for each of these calls, and not too long for any.
    for index in range(done, updates):
        on_first(partial(LearningRun.update, index=index))
        if on_first(partial(LearningRun.is_judged, index=index)):
            on_first(LearningRun.keep_escape_rates)
            on_first(partial(LearningRun.judge, what=f"update {index + 1} of {updates}"))
        on_first(partial(LearningRun.keep_state, index=index))
    on_first(LearningRun.take_mean)
    on_first(LearningRun.keep_escape_rates)
    on_first(partial(LearningRun.judge, what="mean of the later updates"))
    on_first(LearningRun.finish)


def will_learn(job: Job, lengths: Sequence[int]) -> bool:
    """Whether steps and scales will learn from samples of these numbers of tokens; a line says why not.

    Free memory counts. So a run decides once, and keeps the decision for when it is resumed.
    """
    effort = job.recipe.effort
    if effort not in EXTENTS:
        return False
    reason = _obstacle(job, lengths)
    if reason is not None:
        level = logging.WARNING if effort == "best" else logging.INFO
        logger.log(level, "effort %s: steps and scales do not learn: %s", effort, reason)
    return reason is None


def _obstacle(job: Job, lengths: Sequence[int]) -> str | None:
    """Why steps and scales cannot learn; None if they can."""
    effort = job.recipe.effort
    if job.has_experts:
        return "the decoder has experts, which cannot learn"
    if not has_head(job.architecture, job.source, job.recipe):
        return "the model has no head that writes text"
    chosen = choose_samples(lengths, effort)
    if chosen is None:
        return f"give {SAMPLES_PER_HELD} samples or more, with {LEAST_TOKENS} tokens in those of at most {LONGEST}"
    least = _need(job, lengths, chosen)[Kept.ONE_BLOCK]
    return None if least <= job.device_limit else _too_little(least, job.device_limit)


def _too_little(needed: int, free: int) -> str:
    return f"that needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"


def _planned(job: Job, work: WorkDirectory) -> LearningRun:
    """The run of learning. MorphoQuantError if there is less memory than when the run decided to learn."""
    lengths = sample_lengths(work)
    chosen = choose_samples(lengths, job.recipe.effort)
    assert chosen is not None
    need, limit = _need(job, lengths, chosen), job.device_limit
    memory = _most(need, limit)
    if memory is None:
        least = _too_little(need[Kept.ONE_BLOCK], limit)
        raise MorphoQuantError(f"learning: {least}; free memory and run it again, it goes on here")
    logger.info(
        "learning: steps and scales learn from %d samples, and %d others judge",
        *(len(chosen.learned), len(chosen.judging)),
    )
    return LearningRun(job, work, chosen, memory)


def _most(need: Mapping[Kept, int], limit: int) -> Kept | None:
    """The most that may be kept within `limit` bytes; None if nothing fits."""
    return max((memory for memory, size in need.items() if size <= limit), key=need.__getitem__, default=None)


def _need(job: Job, lengths: Sequence[int], chosen: Chosen) -> dict[Kept, int]:
    """Bytes of learning, by what is kept in memory."""
    layers = [
        [layer for name, layer in job.spec.layers.items() if name.startswith(job.names.layer(index, ""))]
        for index in range(job.names.blocks)
    ]
    samples = [*chosen.learned, *chosen.judging]
    longest, total = max(lengths[index] for index in samples), sum(lengths[index] for index in samples)
    config = job.architecture.decoder_config(job.source.config)
    # The states of one sample before every block, and those of all samples that are targets.
    states = 4 * config["hidden_size"] * (longest * (job.names.blocks + 1) + 2 * total)
    head = job.memory_need().front_streamed + 4 * head_tensor(job.architecture, job.names, job.source.tensors).elements
    one = head + learning_bytes(layers, states, longest)
    every = one + sum(map(decoder_bytes, layers))
    # Some models keep the probabilities of their attention, and the logits before them.
    attention = 2 * 4 * config["num_attention_heads"] * longest**2
    graphs = every + sum(graph_bytes(block, longest) + attention for block in layers)
    return {Kept.ONE_BLOCK: one, Kept.BLOCKS: every, Kept.GRAPHS: graphs}
