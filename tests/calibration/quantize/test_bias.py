"""The bias of each set of tokens."""

import pytest
import torch
from torch import Tensor

from calibration.processes import ONE
from calibration.quantize.bias import Means, find_bias, find_means
from calibration.quantize.coded_tokens import CodedTokens, code_tokens, gather_moments
from calibration.quantize.grids import find_input
from calibration.quantize.massive_tokens import find_massive
from calibration.settings.recipe import Recipe
from tests.calibration.inputs import AUDIO, make_spec, matrix, observe, with_massive


def coded_tokens(*, rows: bool) -> tuple[CodedTokens, Tensor, Tensor]:
    """Coded tokens, their values [T, K] in natural order, and which of them are massive."""
    x, modality, outlying = with_massive()
    modality[200:] = AUDIO
    x[200:][~outlying[200:]] *= 0.2
    spec, recipe = make_spec({"m.q": matrix()}), Recipe(modality_rows=rows)
    inputs, tokens = observe(x, modality, 0.0, outlying, x)
    massive = find_massive(x, outlying, 1, tokens, wanted=True)
    found = find_input(inputs.observation, tokens, massive, matrix(), spec, recipe, full_mask=False)
    return code_tokens(x, tokens, massive.local, found, spec), x, massive.local


@pytest.mark.parametrize("rows", [True, False])
def test_the_first_set_has_the_means_of_all_ordinary_tokens(rows: bool) -> None:
    coded, x, massive = coded_tokens(rows=rows)
    assert coded.sets.any_modality_only != rows
    means = find_means(gather_moments(coded, x, matrix()[:, coded.order], ONE), coded, x, x, massive, ONE)
    centre = coded.record.centre[coded.sets.row_of_set]
    expected = x[~massive].mean(0)[coded.order] - centre[0]
    # float32 sums of values up to some hundreds.
    assert torch.allclose(means.value[0], expected, atol=1e-4)
    assert torch.allclose(means.value[-1], x[massive].mean(0)[coded.order] - centre[-1], atol=1e-3)


@pytest.mark.parametrize("any_massive", [True, False])
def test_the_bias_gives_back_the_mean_output(any_massive: bool) -> None:
    coded, x, massive = coded_tokens(rows=True)
    full = matrix()[:, coded.order]
    served = full * 1.1
    means = find_means(gather_moments(coded, x, full, ONE), coded, x, x, massive, ONE)
    [bias] = find_bias(coded, means, full, served, 1, any_massive=any_massive)
    centre = coded.record.centre[coded.sets.row_of_set]
    expected = (means.value + centre) @ full.T
    last = -1 if not any_massive else None
    assert torch.allclose((means.code @ served.T + bias)[:last], expected[:last], rtol=1e-4, atol=1e-2)
    assert torch.equal(bias[-1], bias[0]) != any_massive


def test_blocks_of_channels_share_the_bias() -> None:
    coded, x, _ = coded_tokens(rows=False)
    full = matrix()[:, coded.order]
    means = Means(*gather_moments(coded, x, full, ONE).means())
    whole, parts = (find_bias(coded, means, full, full, blocks, any_massive=True) for blocks in (1, 2))
    assert parts.shape == (2, *whole.shape[1:])
    assert torch.allclose(parts.sum(0), whole[0], rtol=1e-4, atol=1e-3)
