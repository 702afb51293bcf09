"""The estimated cost of each form of an input's weights."""

import torch

from calibration.quantize.bit_losses import Probe, losses

K, N, T = 128, 64, 600


def probe(seed: int = 0) -> Probe:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Probe(normal(T, K) * (normal(K).abs() + 0.2), normal(T, N), normal(N, K))


def test_wider_forms_cost_less_and_sixteen_bits_nothing() -> None:
    found = losses(probe(), 32, 0.04)
    assert found[4] > found[8] > found[16] == 0
    # Weights of 8 bits are 16 times as fine: what is left is the activations' error.
    exact = losses(probe(), 32, 0.0)
    assert exact[8] > found[8], "without escapes activations cost more"


def test_an_output_that_does_not_matter_costs_nothing() -> None:
    given = probe()
    whole = losses(given, 32, 0.04)
    half = given.gradient.clone()
    half[:, : N // 2] = 0
    part = losses(Probe(given.x, half, given.matrix), 32, 0.04)
    assert 0.3 < part[4] / whole[4] < 0.7
    assert losses(Probe(given.x, half * 0, given.matrix), 32, 0.04) == {4: 0.0, 8: 0.0, 16: 0.0}


def test_the_cost_is_the_square_of_the_gradient() -> None:
    given = probe()
    once, twice = (losses(Probe(given.x, given.gradient * factor, given.matrix), 32, 0.04) for factor in (1, 2))
    assert abs(twice[4] / once[4] - 4) < 1e-3 and abs(twice[8] / once[8] - 4) < 1e-3


def test_without_tokens_nothing_is_known() -> None:
    given = probe()
    none = Probe(given.x[:0], given.gradient[:0], given.matrix)
    assert losses(none, 32, 0.04) == {4: 0.0, 8: 0.0, 16: 0.0}
