"""Which damping holds for other tokens, on made inputs and on a tiny model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.damping.__main__ import measured
from benchmarks.damping.measure import measure, relative_loss, second_moments, tokens_of
from benchmarks.damping.report import markdown, means
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels

K = 64


def windows(count: int, seed: int) -> list[Tensor]:
    """Windows [100, K] whose channels share a few directions, the same for every seed."""
    directions = torch.randn(8, K, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(seed)
    return [
        0.3 * torch.randn(100, 8, generator=generator) @ directions + torch.randn(100, K, generator=generator)
        for _ in range(count)
    ]


def test_the_first_token_of_a_window_does_not_count() -> None:
    seen = windows(2, 0)
    expected = torch.cat([x[1:] for x in seen])
    assert tokens_of(seen) == 198
    assert torch.allclose(second_moments(seen), expected.T @ expected / 198, atol=1e-4)
    for x in seen:
        x[0] *= 1000
    assert torch.allclose(second_moments(seen), expected.T @ expected / 198, atol=1e-4)


def test_the_loss_is_that_of_the_outputs() -> None:
    x, weight = windows(1, 0)[0], torch.randn(8, K, generator=torch.Generator().manual_seed(1))
    other = weight.round()
    expected = ((other - weight) @ x[1:].T).square().sum() / (weight @ x[1:].T).square().sum()
    assert relative_loss(weight, other, second_moments([x])) == pytest.approx(float(expected), rel=1e-4)


def test_more_channels_for_each_token_want_more_damping() -> None:
    weight = torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    few, many = (measure(weight, windows(count, 1), windows(40, 2), 0.05, [2.0]) for count in (1, 40))
    assert (few["tokens"], many["tokens"], few["in_features"]) == (99, 3960, K)
    # Seen: 0.76 times.
    assert few["losses"]["2.0"] < 0.85 * few["losses"]["fixed"]
    # With many tokens nearly any damping will do.
    assert many["losses"]["2.0"] < 1.02 * many["losses"]["fixed"]
    assert many["losses"]["fixed"] < few["losses"]["fixed"]


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(MorphoQuantError, match="K = 40 is not divisible by 32"):
        measure(torch.ones(2, 40), [torch.ones(3, 40)], [torch.ones(3, 40)], 0.05, [])


def test_the_table_has_geometric_means_by_channels_and_tokens() -> None:
    rows = [
        {"input": name, "in_features": 64, "tokens": tokens, "losses": {"fixed": 0.5, "2.0": loss}}
        for name, tokens, loss in (("0.q", 99, 0.4), ("0.o", 99, 0.1), ("0.q", 400, 0.5))
    ]
    found = means(rows)
    assert [(mean["tokens"], mean["inputs"]) for mean in found] == [(99, 2), (400, 1)]
    assert found[0]["ratios"] == {"2.0": pytest.approx(0.4)}
    facts = {"command": "c", "machine": "m", "model": "d", "judging_tokens": 7, "fixed": 0.05}
    text = markdown({**facts, "means": found, "rows": rows})
    assert "| 64 | 99 | 0.646 | 2 | 0.400 |" in text
    assert "| 0.o | 64 | 99 | 0.50000 | 0.200 |" in text


@pytest.mark.slow
def test_every_input_of_the_blocks_is_measured_for_every_share(tmp_path: Path) -> None:
    model = TinyModels(tmp_path).model("llama")
    generator = torch.Generator().manual_seed(0)
    seen, judging = (torch.randint(20, 60, (count, 32), generator=generator).tolist() for count in (4, 2))
    rows = list(measured(model, [1], [2, 1], seen, judging))
    assert [(row["input"], row["tokens"]) for row in rows] == [
        (f"1.{name}", tokens)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        for tokens in (62, 124)
    ]
    for missing in (9, -1):
        with pytest.raises(MorphoQuantError, match="has blocks 0 to"):
            list(measured(model, [0, missing], [1], seen, judging))
