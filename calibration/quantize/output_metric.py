"""How errors of a layer's outputs add up in the model, and rounding that lets them cancel. Pure.

The metric [N, N] of a layer is the second moment of the derivatives of the model's output by the layer's N outputs. An
error e of the outputs costs about e^T metric e. Rounding each output by itself would minimise its diagonal only. So
outputs are rounded in runs: the weights of later runs compensate for the errors of earlier ones, as columns do within
an output. YAQA (arXiv 2505.22988) rounds with a metric of outputs, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.group_search import inverse_factor
from morphoquant_vllm.format.layers import LayerSpec

# A layer with more outputs for each input than this has no metric: it would be the largest. The outputs of gate and up
# go to a function of single channels, so their errors mix little. A trial foresaw little gain on new tokens.
MOST_OUTPUTS = 2
# The damping is a fraction of the metric's mean diagonal: this many times outputs over tokens, and at least the latter.
DAMPING_STRENGTH, LEAST_DAMPING = 4.0, 0.5
# Runs have at least so many outputs, since the search of small runs is slow, and there are at most so many runs.
LEAST_RUN, MOST_RUNS = 64, 8

# Codes [n, K] and scales, as `served_weights` rounds them, of the fitted weights [n, K] of some outputs.
Rounded = tuple[Tensor, ...]


def with_metric(layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Those of `layers` whose outputs get a metric, by size: all that share an input, or none."""
    shards: dict[str, dict[str, LayerSpec]] = {}
    for name, layer in layers.items():
        shards.setdefault(layer.shared_input, {})[name] = layer
    return {name: layer for each in shards.values() if have_metrics(each.values()) for name, layer in each.items()}


def have_metrics(shards: Collection[LayerSpec]) -> bool:
    """Whether the outputs of the layers that share an input get metrics, by size."""
    return runs_of(sum(layer.out_features for layer in shards)) > 1 and all(
        layer.weight_bits == 4 and layer.out_features <= MOST_OUTPUTS * layer.in_features for layer in shards
    )


def runs_of(outputs: int) -> int:
    """The number of runs in which so many outputs are rounded."""
    return max(1, min(MOST_RUNS, outputs // LEAST_RUN))


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


class _Aimed:
    """The fitted weights of one layer's outputs, those whose errors cost most first; rounding moves them."""

    def __init__(self, fitted: Tensor, metric: Tensor, processes: Processes) -> None:
        size = fitted.square().mean(1)
        # The processes' sums may differ in their last bits, but the order must not.
        order = processes.broadcast(lambda: (metric.diagonal() * size).argsort(descending=True, stable=True).cpu())
        self.order = order.to(fitted.device)
        self._upper, self._rest = inverse_factor(metric[self.order][:, self.order]), fitted[self.order]

    def span(self, run: int, runs: int) -> slice:
        """The places of a run's outputs."""
        outputs = len(self._rest)
        return slice(run * outputs // runs, (run + 1) * outputs // runs)

    def of(self, span: slice) -> Tensor:
        """The weights at which a run aims."""
        return self._rest[span]

    def compensate(self, span: slice, error: Tensor) -> None:
        """Move later outputs to where the metric expects the least cost, by the error [n, K] of a run."""
        if span.stop < len(self._rest) and span.start < span.stop:
            later = torch.linalg.solve_triangular(self._upper[span, span], self._upper[span, span.stop :], upper=True)
            self._rest[span.stop :].addmm_(later.T, error)


def round_in_runs(
    fitted: Tensor,
    metrics: Sequence[Tensor],
    rounded: Callable[[Tensor], Rounded],
    dequantized: Callable[..., Tensor],
    processes: Processes,
) -> Rounded:
    """Codes and scales of the fitted weights `fitted` [N, K], as from `rounded`, by runs of outputs.

    metrics [n, n]: those of the layers whose outputs these are, in their order. `dequantized` gives the weights of
    codes and scales. A run has its share of each layer's outputs, and each process rounds some of them. Errors of
    different layers do not compensate for each other.
    """
    sizes = [len(metric) for metric in metrics]
    parts = [_Aimed(part, metric.float(), processes) for part, metric in zip(fitted.split(sizes), metrics, strict=True)]
    runs, found = runs_of(len(fitted)), list[Rounded]()
    places: list[Tensor] = []
    for run in range(runs):
        spans = [part.span(run, runs) for part in parts]
        aimed = torch.cat([part.of(each) for part, each in zip(parts, spans, strict=True)])
        owners = processes.owners(len(aimed))
        codes_and_scales = rounded(aimed[processes.share(len(aimed))])
        found.append(tuple(processes.all_gather_rows(value, owners) for value in codes_and_scales))
        errors = (dequantized(*found[-1]) - aimed).split([each.stop - each.start for each in spans])
        for part, each, error in zip(parts, spans, errors, strict=True):
            part.compensate(each, error)
        first = 0
        for part, each, size in zip(parts, spans, sizes, strict=True):
            places.append(first + part.order[each])
            first += size
    natural = torch.cat(places).argsort()
    return tuple(torch.cat(values)[natural] for values in zip(*found, strict=True))
