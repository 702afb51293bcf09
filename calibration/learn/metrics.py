"""Metrics of outputs by the divergence of the next token: one pass forward through the 16-bit blocks, and one back.

The derivatives are those of successors that are drawn from the model's own probabilities. An error of a linear's
outputs, times these derivatives, squared, is on average twice the divergence that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks.capture import MemoryInput
from calibration.blocks.sensitivity import Passes, run_passes
from calibration.job import Job
from calibration.learn.divergence import drawn_derivatives
from calibration.learn.head import Head
from calibration.learn.targets import counted_tokens
from calibration.quantize.output_metric import with_metric
from calibration.work.budgets import keep_metrics, metrics_file
from calibration.work.directory import WorkDirectory
from calibration.work.durable_files import FileRecord
from morphoquant_vllm.format.schema import TEXT_ROW

# Tokens of the passes, about, and no more than are drawn.
METRIC_TOKENS = 2**13


@dataclass(frozen=True)
class _DrawnSuccessors:
    """Derivatives of a sample's last states by successors drawn for its tokens."""

    head: Head
    # The row of text, and the source of the draws.
    text: int
    generator: torch.Generator

    def __call__(self, sample: MemoryInput, massive: Tensor, last: Tensor) -> Tensor:
        """Float32 [1, M, hidden]: 0 for tokens that do not count."""
        counted = counted_tokens(sample.modality, massive.cpu(), self.text)
        with torch.enable_grad():
            leaf = last[0].float().requires_grad_()
            states = self.head.normed(leaf)[counted.to(self.head.weight.device)]
        derivatives = drawn_derivatives(states.detach(), self.head.weight, self.generator)
        return torch.autograd.grad(states, leaf, derivatives)[0][None]


def find_metrics(job: Job, work: WorkDirectory, begin: Callable[[], Passes]) -> dict[str, FileRecord]:
    """Keep the metrics of the outputs of each block's linears; their files, by name.

    The first process begins the passes and measures, the others wait block by block.
    """
    files: dict[str, FileRecord] = {}

    def turn(passes: Passes) -> None:
        # The head is in memory only here, without any block.
        head = Head(job.architecture, job.names, job.source, job.recipe, job.device)
        generator = torch.Generator(head.weight.device).manual_seed(job.recipe.seed)
        passes.start_back(_DrawnSuccessors(head, job.spec.rows.index(TEXT_ROW), generator))

    def back(passes: Passes, index: int) -> None:
        linears = _with_metric(job, index)
        found = {linears[name]: metric for name, metric in passes.metrics(index, list(linears)).items()}
        if found:
            files[metrics_file(work.path, index).name] = keep_metrics(work, index, found)

    run_passes(begin, job.names.blocks, job.processes, turn=turn, back=back)
    return job.processes.broadcast(lambda: files, [FileRecord])


def _with_metric(job: Job, block: int) -> dict[str, str]:
    """The layers of the linears of a block whose outputs get a metric, by their names in the block."""
    start = job.names.layer(block, "")
    layers = {name: layer for name, layer in job.spec.layers.items() if name.startswith(start)}
    return {name.removeprefix(start): name for name in with_metric(layers)}
