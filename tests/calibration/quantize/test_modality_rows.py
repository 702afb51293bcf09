"""When a modality gets a row of its own, and what that row is."""

import pytest
import torch
from torch import Tensor

from calibration.quantize.modality_rows import MIN_TOKENS, ModalityRow, RowTokens, choose_row
from morphoquant_vllm.numerics.activation import GUARD_CODES, Grid, escapes

K, TOKENS = 48, 800
MATRIX = torch.randn(32, K, generator=torch.Generator().manual_seed(1))
GRID = Grid(torch.full((K,), 0.5), torch.zeros(K), torch.ones(K))


def values(scale: float, offset: float = 0.0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(2)) * scale + offset


def choose(x: Tensor, budget: float = 0.04, margin: float = 0.02, grid: Grid = GRID) -> ModalityRow:
    mask = torch.full((K,), budget > 0)
    return choose_row(RowTokens.of(x), x.amin(0), x.amax(0), grid, mask, MATRIX, budget, margin)


def codes_of(x: Tensor, row: ModalityRow) -> Tensor:
    return torch.round((x - row.centre) / (GRID.step * row.choice.gain))


def test_a_quiet_modality_gets_a_finer_grid() -> None:
    x = values(0.5)
    row = choose(x)
    assert row.choice.own and row.choice.gain < 0.5
    assert row.choice.own_error is not None and row.choice.any_error is not None
    assert row.choice.own_error < 0.5 * row.choice.any_error
    # On tokens that it was not sought on, too: the same distribution, and gains are a tenth apart.
    assert 0.02 < float(escapes(codes_of(values(0.5), row)).float().mean()) < 0.05


def test_a_loud_modality_gets_a_coarser_grid_within_the_budget_only_if_it_pays() -> None:
    """It would escape on the common grid, exactly; its own loses more, and is left."""
    row = choose(values(3.0))
    assert not row.choice.own
    assert row.choice.gain == 1.0 and torch.equal(row.centre, GRID.centre)
    assert row.choice.any_escape_rate is not None and row.choice.any_escape_rate > 0.1
    assert row.choice.own_escape_rate is not None and row.choice.own_escape_rate < 0.05
    # Without escapes its values are clipped: there a coarser grid pays.
    clipped = choose(values(3.0), budget=0.0)
    assert clipped.choice.own and clipped.choice.gain > 1


def test_a_modality_that_lies_elsewhere_gets_its_centre() -> None:
    x = values(0.8, offset=3.0)
    row = choose(x)
    assert row.choice.own
    assert torch.allclose(row.centre, x.mean(0), atol=0.3)  # the middle of two quantiles of 400 values


def test_heavy_tails_do_not_move_the_centre() -> None:
    """Where the middle of two quantiles says little, the common centre stays."""
    x = values(0.5)
    x[::30, ::2] = 10.0
    row = choose(x)
    assert torch.equal(row.centre, GRID.centre)


def test_no_row_where_it_saves_less_than_the_margin() -> None:
    x = values(0.5)
    saved = choose(x)
    assert saved.choice.own_error is not None and saved.choice.any_error is not None
    part = 1 - saved.choice.own_error / saved.choice.any_error
    assert choose(x, margin=part - 0.01).choice.own
    strict = choose(x, margin=part + 0.01)
    assert not strict.choice.own and strict.choice.gain == 1.0
    assert f"{-part:+.1%}" in strict.choice.reason


@pytest.mark.parametrize("tokens", [1, MIN_TOKENS - 1])
def test_few_tokens_get_no_row(tokens: int) -> None:
    row = choose(values(0.1, tokens=tokens))
    assert not row.choice.own
    assert str(tokens) in row.choice.reason
    assert choose(values(0.1, tokens=MIN_TOKENS)).choice.own


def test_it_is_judged_on_tokens_that_it_was_not_sought_on() -> None:
    """The runs that are held out are loud: a fine grid that suits the others is no gain there."""
    x = values(0.3)
    for run in x.tensor_split(8)[1::2]:
        run.mul_(8)
    row = choose(x)
    assert row.choice.own_escape_rate is not None and row.choice.own_escape_rate > 0.3
    quiet = choose(torch.cat(x.tensor_split(8)[0::2]))
    assert quiet.choice.own_escape_rate is not None and quiet.choice.own_escape_rate < 0.05


def test_nothing_seen_saturates() -> None:
    x = values(0.3)
    x[7, 3] = 40.0
    row = choose(x)
    assert row.choice.own
    # The farthest value may sit at GUARD_CODES; float32 noise may round it to the next code.
    assert float(codes_of(x, row).abs().max()) <= GUARD_CODES + 1


def test_constant_tokens_leave_no_error_to_lower() -> None:
    row = choose(torch.zeros(TOKENS, K))
    assert not row.choice.own
    assert row.choice.reason == "no error to lower"
