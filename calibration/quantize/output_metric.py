"""How errors of a layer's outputs add up in the model, and rounding that lets them cancel. Pure.

The metric [N, N] of a layer is the second moment of the derivatives of the model's output by the layer's N outputs. An
error e of the outputs costs about e^T metric e. Rounding each output by itself would minimise its diagonal only. So
outputs are rounded in runs: the targets of later runs compensate for the errors of earlier ones, as columns do within
an output. YAQA (arXiv 2505.22988) rounds with a metric of outputs, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.group_search import inverse_factor
from morphoquant_vllm.format.layers import LayerSpec

# A layer with more outputs for each input than this has no metric: it would be the largest. The outputs of gate and up
# go to a function of single channels, so their errors mix little, and a trial foresaw little gain on new tokens.
MOST_OUTPUTS = 2
# The damping is a fraction of the metric's mean diagonal: this many times outputs over tokens, and at least the latter.
DAMPING_STRENGTH, LEAST_DAMPING = 4.0, 0.5
# Runs have at least so many outputs, since the search of small runs is slow, and there are at most so many runs.
LEAST_RUN, MOST_RUNS = 64, 8

# Codes [n, K] and scales, as `served_weights` rounds them, of the targets [n, K] of some outputs.
Rounded = tuple[Tensor, ...]


def has_metric(layer: LayerSpec) -> bool:
    """Whether a layer's outputs have a metric, by its size."""
    return layer.out_features <= MOST_OUTPUTS * layer.in_features


class OutputMoment:
    """The second moment of derivatives by a layer's outputs, added up over samples."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def add(self, gradient: Tensor) -> None:
        """Add the derivatives [M, N] of a sample."""
        moment = gradient.float().T @ gradient.float()
        self._total = moment if self._total is None else self._total.add_(moment)
        self._tokens += gradient.shape[0]

    def metric(self) -> Tensor | None:
        """The damped metric float32 [N, N], of mean diagonal 1; None if all derivatives are 0, or some not finite."""
        mean = 0.0 if self._total is None else float(self._total.diagonal().mean())
        if self._total is None or not 0 < mean < math.inf:
            return None
        metric = self._total / mean
        metric.diagonal().add_(max(LEAST_DAMPING, DAMPING_STRENGTH * metric.shape[0] / self._tokens))
        return metric / metric.diagonal().mean()


def joint_metric(metrics: Mapping[str, Tensor], layers: Iterable[str], device: torch.device) -> Tensor | None:
    """The metric of the outputs of several layers together, float32 [N, N]; None if a layer has none.

    Errors of different layers do not compensate for each other.
    """
    names = list(layers)
    if not all(name in metrics for name in names):
        return None
    return torch.block_diag(*(metrics[name].to(device, torch.float32) for name in names))


def round_in_runs(
    target: Tensor,
    metric: Tensor,
    rounded: Callable[[Tensor], Rounded],
    dequantized: Callable[..., Tensor],
    processes: Processes,
) -> Rounded:
    """Codes and scales of the weights `target` [N, K], as from `rounded`, by runs of outputs.

    metric: as from `joint_metric`. `dequantized` gives the weights of codes and scales. Outputs whose errors cost most
    come first, while most others are left to compensate for them. Each process rounds some outputs of each run.
    """
    size = target.square().mean(1)
    # The processes' sums may differ in their last bits, but the order must not.
    order = processes.broadcast(lambda: (metric.diagonal() * size).argsort(descending=True, stable=True).cpu())
    order = order.to(target.device)
    upper, rest = inverse_factor(metric[order][:, order]), target[order]
    count = max(1, min(MOST_RUNS, rest.shape[0] // LEAST_RUN))
    ends = [(run + 1) * rest.shape[0] // count for run in range(count)]
    found: list[Rounded] = []
    for start, end in zip([0, *ends], ends, strict=False):
        aimed, owners = rest[start:end], processes.owners(end - start)
        own = rounded(aimed[processes.share(end - start)])
        found.append(tuple(processes.all_gather_rows(part, owners) for part in own))
        if end < rest.shape[0]:
            error = dequantized(*found[-1]) - aimed
            later = torch.linalg.solve_triangular(upper[start:end, start:end], upper[start:end, end:], upper=True)
            rest[end:].addmm_(later.T, error)
    natural = order.argsort()
    return tuple(torch.cat(parts)[natural] for parts in zip(*found, strict=True))
