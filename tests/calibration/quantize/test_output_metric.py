"""Outputs whose errors add up in the model: their metric, and rounding that lets the errors cancel."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.processes import ONE, Processes
from calibration.quantize.output_metric import (
    DAMPING_STRENGTH,
    LEAST_DAMPING,
    OutputMoment,
    round_in_runs,
    with_metric,
)
from calibration.quantize.rounding import quantize_two_level
from morphoquant_vllm.numerics import weights
from tests.calibration.inputs import make_spec
from tests.calibration.joined import in_processes

N, K, GROUP = 256, 64, 32
CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGET = random(N, K, seed=1)
_CODES = random(500, K, seed=2) @ random(K, K, seed=3)
HESSIAN = _CODES.T @ _CODES / 500


def derivatives(tokens: int = 4000, seed: int = 4) -> Tensor:
    """Derivatives of a model that sees few directions of the outputs well, and the others a little."""
    seen = random(8, N, seed=5)
    return random(tokens, 8, seed=seed) @ seen + 0.3 * random(tokens, N, seed=seed + 1)


def rounded(aimed: Tensor) -> tuple[Tensor, ...]:
    return quantize_two_level(aimed, HESSIAN, GROUP, 16, 0.01)


def dequantized(codes: Tensor, level: Tensor, unit: Tensor) -> Tensor:
    return weights.dequantize_weight(weights.pack(codes), level, unit)


def metric_of(*gradients: Tensor) -> Tensor:
    moment = OutputMoment()
    for gradient in gradients:
        moment.add(gradient)
    found = moment.metric()
    assert found is not None
    return found


def cost(found: tuple[Tensor, ...], gradient: Tensor) -> float:
    """The error of the model's output that rounding makes, by derivatives that the metric has not seen."""
    error = dequantized(*found) - TARGET
    return float(((gradient.T @ gradient) @ error @ HESSIAN * error).sum())


def runs(metric: Tensor, processes: Processes = ONE) -> tuple[Tensor, ...]:
    return round_in_runs(TARGET, [metric], rounded, dequantized, processes)


def test_the_model_errs_less_on_new_tokens() -> None:
    metric = metric_of(derivatives())
    new = derivatives(seed=8)
    assert cost(runs(metric), new) < 0.8 * cost(rounded(TARGET), new)


def test_outputs_that_do_not_mix_are_rounded_by_themselves() -> None:
    """In any order, and each result at its own output."""
    apart = torch.rand(N, generator=torch.Generator().manual_seed(6)).add(0.1).diag()
    assert all(torch.equal(*pair) for pair in zip(runs(apart), rounded(TARGET), strict=True))


def test_processes_agree_and_round_as_well_as_one(tmp_path: Path) -> None:
    """Products of fewer outputs may differ in their last bits, and then codes at ties."""
    metric = metric_of(derivatives())
    first, *others = in_processes(tmp_path, lambda processes: runs(metric, processes), 3)
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))
    new, one = derivatives(seed=8), runs(metric)
    assert float((first[0] != one[0]).float().mean()) < 0.05
    assert cost(first, new) == pytest.approx(cost(one, new), rel=0.05)


def test_the_metric_is_the_mean_of_all_samples_and_damped() -> None:
    parts = derivatives().split([1000, 3000])
    metric = metric_of(*parts)
    moment = torch.cat(parts).T @ torch.cat(parts)
    expected = moment / moment.diagonal().mean()
    expected.diagonal().add_(LEAST_DAMPING)
    torch.testing.assert_close(metric, expected / (1 + LEAST_DAMPING))


def test_few_tokens_damp_the_metric_more() -> None:
    """So much that the compensation of chance correlations vanishes."""
    gradient = derivatives(32)
    metric = metric_of(gradient)
    assert DAMPING_STRENGTH * N / 32 == 32
    moment = gradient.T @ gradient
    moment /= moment.diagonal().mean()
    torch.testing.assert_close(metric - metric.diagonal().diag(), (moment - moment.diagonal().diag()) / 33)


def test_no_metric_without_derivatives() -> None:
    moment = OutputMoment()
    assert moment.metric() is None
    moment.add(torch.zeros(9, N))
    assert moment.metric() is None
    for broken in (float("inf"), float("nan")):
        moment.add(torch.full((9, N), broken))
        assert moment.metric() is None


def test_errors_of_different_layers_do_not_compensate_for_each_other() -> None:
    """The same as one layer of which each half has a metric of its own."""
    halves = [metric_of(derivatives(seed=seed)[:, :128]) for seed in (4, 5)]
    found = round_in_runs(TARGET, halves, rounded, dequantized, ONE)
    # Each half in as many runs as both have together, of half as many outputs.
    for half, own in enumerate((slice(0, 128), slice(128, 256))):
        parts = []

        def one(aimed: Tensor, parts: list[Tensor] = parts) -> tuple[Tensor, ...]:
            parts.append(aimed)
            return rounded(aimed)

        first = round_in_runs(TARGET[own], [halves[half]], one, dequantized, ONE)
        assert len(parts) == 2 and not torch.equal(first[0], rounded(TARGET[own])[0])
    assert found[0].shape == TARGET.shape
    error, apart = dequantized(*found) - TARGET, dequantized(*rounded(TARGET)) - TARGET
    for half, own in enumerate((slice(0, 128), slice(128, 256))):
        costs = [float((halves[half] @ each[own] @ HESSIAN * each[own]).sum()) for each in (error, apart)]
        assert costs[0] < 0.8 * costs[1]


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [
        ({"q": 128}, True),
        ({"q": 64, "k": 64}, True),
        ({"q": 64}, False),
        ({"q": 160}, False),
        ({"q": 160, "k": 64}, False),
    ],
)
def test_layers_with_metrics(outputs: dict[str, int], wanted: bool) -> None:
    """Not those that spread their input or are rounded in one run; all that share an input, or none."""
    layers = make_spec({f"m.{name}": torch.zeros(count, 64) for name, count in outputs.items()}).layers
    assert with_metric(layers) == (layers if wanted else {})


def test_layers_of_other_widths_have_no_metric() -> None:
    layers = make_spec({"m.q": torch.zeros(128, 64)}).layers
    assert not with_metric({name: replace(layer, weight_bits=8) for name, layer in layers.items()})
