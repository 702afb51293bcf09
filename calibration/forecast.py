"""What a calibration will do: layers, tokens, memory, disk and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from calibration.blocks.memory_need import MemoryNeed
from calibration.blocks.sensitivity import BUDGET_TOKENS
from calibration.blocks.time_need import (
    experts_operations,
    metric_operations,
    operations,
    product_speed,
    sharing_operations,
)
from calibration.data.token_choice import DrawnTokens
from calibration.job import Job
from calibration.learn.metrics import METRIC_TOKENS
from calibration.learn.need import learning_operations
from calibration.model.bits import extra_bytes
from calibration.model.experts import CHOSEN
from calibration.model.head_tensor import head_tensor
from calibration.output.export import checkpoint_size, quantized_size
from calibration.settings.recipe import rounds_jointly, shares_budget
from calibration.work.budgets import metrics_bytes
from morphoquant_vllm.format.layers import LayerSpec


@dataclass(frozen=True)
class Forecast:
    """The work of a calibration, and its need of one process; sizes are in bytes."""

    layers: int
    blocks: int
    samples: int
    # Tokens of each row in all samples.
    tokens: Mapping[str, int]
    drawn_tokens: int
    memory: MemoryNeed
    memory_limit: int
    # Of the work directory, and of the new checkpoint's tensors and files.
    work: int
    checkpoint: int
    # Of the decoder's blocks; None if there is no estimate.
    seconds: float | None
    # Of learning after them; None if nothing learns.
    learning_seconds: float | None = None
    # Routed experts of all blocks.
    experts: int = 0

    def lines(self) -> list[str]:
        """The forecast for people."""
        tokens = ", ".join(f"{row} {count}" for row, count in self.tokens.items())
        more = "" if self.learning_seconds is None else "; learning may take more of it"
        experts = f" and {self.experts} experts" if self.experts else ""
        return [
            f"{self.layers} linears{experts} in {self.blocks} blocks, on {self.samples} samples",
            f"tokens: {tokens}; the search looks at {self.drawn_tokens}",
            f"memory: up to {_gb(self.memory.most)} of {_gb(self.memory_limit)}{self._tight()}{more}",
            f"disk: {_gb(self.work)} for the work directory until the end, {_gb(self.checkpoint)} for the checkpoint",
            f"time: {self._time()}",
        ]

    def _tight(self) -> str:
        if self.memory.least > self.memory_limit:
            return f"; the system may stop the run for lack of memory: calibrate with {self.memory.remedy}"
        return "" if self.memory.front <= self.memory_limit else "; parts are read from disk instead, which is slower"

    def _time(self) -> str:
        if self.seconds is None:
            return "the line of each block has an estimate of the rest"
        learning = "" if self.learning_seconds is None else f" and {duration(self.learning_seconds)} for learning"
        return (
            f"about {duration(self.seconds)} for the blocks{learning}, a rough estimate if nothing else runs on this "
            "machine; the line of each block has a better one"
        )


def forecast(job: Job, tokens: DrawnTokens, rendered: int) -> Forecast:
    """What the calibration will do and need; `rendered`: bytes of the samples' pixels and sounds."""
    source, spec = job.source, job.spec
    # The inputs of the first block, and two generations of both streams.
    hidden_size = job.architecture.decoder_config(source.config)["hidden_size"]
    more = extra_bytes(spec, job.names.prefix, job.recipe)
    states = sum(tokens.counts.values()) * hidden_size * getattr(torch, job.recipe.dtype).itemsize
    jointly = rounds_jointly(job.recipe, learns=job.may_learn(tokens))
    metrics = metrics_bytes(_decoder_layers(job)) if jointly else 0
    seconds, learning_seconds = _seconds(job, tokens)
    return Forecast(
        layers=len(spec.layers),
        blocks=job.names.blocks,
        samples=len(tokens.positions),
        tokens={spec.rows[row]: count for row, count in tokens.counts.items()},
        drawn_tokens=tokens.modality.numel(),
        memory=job.memory_need(tokens),
        memory_limit=job.device_limit,
        # Rendered media are gone before the first block is finished. Quantized towers give two states for each token.
        work=max(quantized_size(source, spec) + more + 5 * states + metrics, rendered + 2 * states),
        checkpoint=checkpoint_size(source, spec) + more,
        experts=sum(settings.count for settings in spec.experts.values()),
        seconds=seconds,
        learning_seconds=learning_seconds,
    )


def _decoder_layers(job: Job) -> dict[str, LayerSpec]:
    return {name: layer for name, layer in job.spec.layers.items() if name.startswith(f"{job.names.prefix}.")}


def _seconds(job: Job, tokens: DrawnTokens) -> tuple[float | None, float | None]:
    """The time for the blocks, and for learning, on one process's CPU.

    The first is None elsewhere, and if the experts of a token are not counted; the second too if nothing learns.
    """
    prefix, all_tokens, drawn = f"{job.names.prefix}.", sum(tokens.counts.values()), tokens.modality.numel()
    lists = [experts for name, experts in job.spec.experts.items() if name.startswith(prefix)]
    chosen = job.architecture.decoder_config(job.source.config).get(CHOSEN) if lists else 0
    if job.device.type != "cpu" or job.processes.size > 1 or not isinstance(chosen, int):
        return None, None
    named = _decoder_layers(job)
    layers = list(named.values())
    work = operations(layers, all_tokens, drawn)
    work += sum(experts_operations(experts, chosen, all_tokens, drawn) for experts in lists)
    learns = job.may_learn(tokens)
    if shares_budget(job.recipe, learns=learns):
        work += sharing_operations(layers, min(BUDGET_TOKENS, drawn))
    if rounds_jointly(job.recipe, learns=learns):
        work += metric_operations(named, min(METRIC_TOKENS, drawn))
    speed = product_speed()
    if not learns:
        return work / speed, None
    head = head_tensor(job.architecture, job.names, job.source.tensors).elements
    return work / speed, learning_operations(layers, head, all_tokens, job.recipe.effort) / speed


def duration(seconds: float) -> str:
    """Seconds for people, in two figures at most."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} s"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
