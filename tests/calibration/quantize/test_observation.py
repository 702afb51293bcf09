import pytest
import torch
from torch import nn

from calibration.quantize.observation import InputCollector, run_observed
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
    assert torch.equal(seen.sample, x[[1, 3, 7]])
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
    assert torch.equal(collector.observation().sample, x[0, 1:2])
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
