import pytest
import torch
from torch import nn

from calibration.data.token_choice import choose_tokens
from calibration.quantize.observation import InputCollector, RoutedCollector, run_observed
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.statistics import ChannelStatistics


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        return self.proj(hidden * scale)


def test_statistics_and_sampled_tokens_are_those_of_the_linears_input() -> None:
    torch.manual_seed(0)
    block, collector = Block(), InputCollector("layer")
    samples = [torch.randn(1, 5, 4), torch.randn(1, 3, 4)]
    modalities = [torch.tensor([0, 0, 2, 2, 0]), torch.tensor([0, 0, 0])]
    positions = [torch.tensor([1, 3]), torch.tensor([2])]
    with torch.no_grad():
        for hidden, modality, chosen in zip(samples, modalities, positions, strict=True):
            output = run_observed(block, hidden, {"scale": 2.0}, {"proj": collector}, modality, chosen)
            assert torch.equal(output, block(hidden, 2.0))
    seen = collector.observation()
    x = 2 * torch.cat([hidden[0] for hidden in samples])
    rows = torch.cat(modalities)
    assert torch.equal(seen.drawn, x[[1, 3, 7]])
    assert list(seen.statistics) == [0, 2]
    for row, statistics in seen.statistics.items():
        expected = ChannelStatistics.of(x[rows == row])
        assert statistics.tokens == int((rows == row).sum())
        assert torch.equal(statistics.maximum, expected.maximum)
        # The sums of two samples are added in another order.
        assert torch.allclose(statistics.abs_sum, expected.abs_sum, rtol=1e-6)


def test_a_run_may_stop_at_the_first_input() -> None:
    """With `stop` nothing after the linear runs: its output, were it computed, would raise."""

    class Stops(Block):
        def forward(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
            super().forward(hidden, scale)
            raise AssertionError("ran on")

    block, collector = Stops(), InputCollector("layer")
    x = torch.arange(12.0).view(1, 3, 4)
    rows = torch.tensor([0, 5, 0])
    result = run_observed(block, x, {"scale": 1.0}, {"proj": collector}, rows, torch.tensor([1]), stop=True)
    assert result is None
    assert torch.equal(collector.observation().drawn, x[0, 1:2])
    assert sorted(collector.observation().statistics) == [0, 5]
    assert not block.proj._forward_pre_hooks
    with pytest.raises(AssertionError, match="ran on"):
        run_observed(block, x, {"scale": 1.0}, {}, rows, torch.tensor([1]), stop=True)


def test_hooks_are_removed_after_a_failure() -> None:
    block = Block()
    with pytest.raises(MorphoQuantError, match="layer: its input has 2 tokens of a calibration sample of 3"):
        collectors = {"proj": InputCollector("layer")}
        run_observed(block, torch.ones(1, 2, 4), {"scale": 1.0}, collectors, torch.zeros(3), torch.zeros(0))
    assert not block.proj._forward_pre_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(MorphoQuantError, match=r"blocks\.0\.proj: its input holds NaN or infinite values"):
        InputCollector("blocks.0.proj").add(x, torch.zeros(3), torch.tensor([0]))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden[0], ids, torch.ones(ids.shape))[None]


class Experts(nn.Module):
    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden


def test_the_experts_of_tokens_are_noted_by_modality() -> None:
    ids = [torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.tensor([[1, 0]])]
    modalities = [torch.tensor([0, 3, 0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)]
    chosen = [torch.tensor([0, 1]), torch.tensor([0])]
    running: list[torch.Tensor] = []
    collector = RoutedCollector("experts", (6, 4), lambda: running[-1])
    for sample in range(2):
        running.append(modalities[sample])
        hidden = torch.randn(1, ids[sample].shape[0], 4)
        # The first token is massive: its row is not its modality.
        rows = torch.where(torch.arange(ids[sample].shape[0]) == 0, 5, modalities[sample])
        run_observed(Routed(), hidden, {"ids": ids[sample]}, {"experts": collector}, rows, chosen[sample])
    tokens = choose_tokens([torch.zeros(3), torch.zeros(1)], 100, 1.0, 0)
    routing = collector.routing(tokens)
    assert routing.chosen.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
    assert routing.counts[0].tolist() == [2, 1, 1, 0] and routing.counts[3].tolist() == [1, 2, 1, 0]
    assert int(routing.counts.sum()) == 8
