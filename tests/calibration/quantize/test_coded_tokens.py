"""Which row serves each drawn token, and which bias."""

import torch

from calibration.processes import ONE
from calibration.quantize.coded_tokens import BiasSets, code_tokens, gather_moments, weigh_massive_alike
from calibration.quantize.grids import find_input
from calibration.quantize.massive_tokens import find_massive
from calibration.settings.recipe import Recipe
from tests.calibration.inputs import ANY, AUDIO, MASSIVE, TEXT, make_spec, matrix, observe, with_massive


def test_each_row_has_the_bias_of_its_set() -> None:
    sets = BiasSets.of([AUDIO], make_spec({"m.q": matrix()}), torch.device("cpu"))
    assert sets.row_of_set.tolist() == [ANY, AUDIO, MASSIVE]
    assert sets.of_row.tolist() == [0, 0, 0, 1, 0, 2]
    assert not sets.any_modality_only
    assert BiasSets.of([], make_spec({"m.q": matrix()}), torch.device("cpu")).any_modality_only


def test_a_token_takes_the_massive_row_or_that_of_its_modality_or_that_of_any() -> None:
    x, modality, outlying = with_massive()
    modality[200:] = AUDIO
    x[200:][~outlying[200:]] *= 0.2
    spec, recipe = make_spec({"m.q": matrix()}), Recipe()
    inputs, tokens = observe(x, modality, 1.0, outlying, x)
    massive = find_massive(x, outlying, 1, tokens, wanted=True)
    assert torch.equal(massive.local, outlying) and torch.equal(massive.all, outlying)
    found = find_input(inputs.observation, tokens, massive, matrix(), spec, recipe, full_mask=False)
    assert found.grids.separate == [AUDIO], "text is better off with the row for any"
    coded = code_tokens(x, tokens, massive.local, found, spec)
    expected = torch.where(modality == TEXT, ANY, modality)
    assert torch.equal(coded.rows, torch.where(outlying, MASSIVE, expected).int())
    assert torch.equal(coded.sets.row_of_set[coded.token_set], coded.rows.long())
    assert torch.equal(coded.gain, found.tensors["gain"][coded.rows.long()])


def test_no_token_is_massive_where_none_shall_be() -> None:
    x, modality, outlying = with_massive()
    _, tokens = observe(x, modality, 1.0, outlying, x)
    massive = find_massive(x, outlying, 1, tokens, wanted=False)
    assert not bool(massive.local.any()) and not bool(massive.all.any())


def test_a_massive_token_weighs_in_the_fit_as_much_as_another_and_keeps_its_means() -> None:
    x, modality, outlying = with_massive()
    # Loud, and unlike each other.
    x[outlying] *= torch.linspace(20, 60, int(outlying.sum()))[:, None]
    spec = make_spec({"m.q": matrix()})
    inputs, tokens = observe(x, modality, 1.0, outlying, x)
    massive = find_massive(x, outlying, 1, tokens, wanted=True)
    assert torch.equal(massive.local, outlying)
    found = find_input(inputs.observation, tokens, massive, matrix(), spec, Recipe(), full_mask=False)
    coded = code_tokens(x, tokens, massive.local, found, spec)
    alike = weigh_massive_alike(coded, ONE)
    assert torch.equal(alike.weight[~outlying], coded.weight[~outlying])
    before, after = (gather_moments(each, x, matrix(), ONE) for each in (coded, alike))
    # Sums of the same numbers times one factor.
    for old, new in zip(before.means(), after.means(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    centred = [float(each.take_centred()[0].diagonal().sum()) for each in (before, after)]
    values = coded.codes.float() * coded.gain[:, None]
    ordinary = values[~outlying].square().sum(1) @ coded.weight[~outlying] / coded.weight[~outlying].sum()
    # The mean energy of all tokens is that of the others, less the square of their mean, whose share is small here.
    assert centred[0] > 2 * float(ordinary)
    assert 0.8 * float(ordinary) < centred[1] < 1.01 * float(ordinary)
