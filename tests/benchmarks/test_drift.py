"""Figures of two runs, and codes that noise moves."""

import pytest
import torch
import transformers

from benchmarks.drift import residual
from benchmarks.drift.__main__ import lines
from benchmarks.drift.figures import gaps, moved_codes, ties


def test_gaps_are_of_magnitudes() -> None:
    assert gaps([-1.0, -2.0], [-1.5, -1.0]) == {
        "mean": pytest.approx(0.75),
        "p99": pytest.approx(0.995),
        "largest": pytest.approx(1.0),
    }


def test_a_value_at_a_tie_moves_and_one_in_the_middle_does_not() -> None:
    # In steps of 1: half to even keeps 0.5 at 0, and the next bfloat16 above it is 1.
    x = torch.tensor([0.5, 1.0]).bfloat16()
    assert moved_codes(x, 1.0, 0.0) == 0.5
    assert ties(x, 1.0) == 0.5
    # With limits moved, 0.5 is 1 before and after.
    assert moved_codes(x, 1.0, 0.1) == 0.0


def test_a_value_below_zero_moves_away_from_it() -> None:
    assert moved_codes(torch.tensor([-0.5]).bfloat16(), 1.0, 0.0) == 1.0


def test_halves_in_float32_give_their_sum_and_rounded_ones_another() -> None:
    y = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        residual.split_sum(y, torch.Generator().manual_seed(0), dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (exact - y).abs().max() < 1e-6
    assert 0.2 < (rounded != y.bfloat16()).float().mean() < 0.8


def test_codes_that_differ_are_counted() -> None:
    codes = [torch.tensor([1, 2, 3, 4])]
    moved = [torch.tensor([1, 2, 0, 4])]
    assert residual.apart(([-1.0], codes), ([-1.5], moved)) == {
        "mean": 0.5,
        "p99": 0.5,
        "largest": 0.5,
        "moved codes": 0.25,
    }
    assert "moved codes" not in residual.apart(([-1.0], []), ([-1.5], []))


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).bfloat16()
    for module in residual.row_parallel(model):
        module.float()
    return model


@pytest.mark.parametrize("entry", residual.SIXTEEN_BIT)
def test_what_is_kept_in_float32_is_in_float32_and_the_rest_is_not(
    llama: transformers.LlamaForCausalLM, entry: str
) -> None:
    kept = residual.KEPT[entry]
    seen: dict[str, torch.dtype] = {}

    def note(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[name] = inputs[0].dtype

    block = llama.model.layers[1]
    watched = {"residual": block.input_layernorm, "norm": block.self_attn.q_proj}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, inputs))
        for name, module in watched.items()
    ]
    residual.ask(llama, kept, [list(range(20))])
    for handle in handles:
        handle.remove()
    assert seen["residual"] == (torch.float32 if kept.residual else torch.bfloat16)
    assert seen["norm"] == torch.bfloat16
    assert not block.mlp.down_proj._forward_hooks, "hooks are removed"


@pytest.mark.parametrize("change", residual.CHANGES)
def test_a_change_moves_log_probabilities_a_little(llama: transformers.LlamaForCausalLM, change: str) -> None:
    prompt = [list(range(100))]
    plain = residual.ask(llama, residual.Kept(), prompt)
    assert residual.apart(plain, residual.ask(llama, residual.Kept(), prompt))["largest"] == 0
    assert 0 < residual.apart(plain, residual.ask(llama, residual.Kept(), prompt, change))["largest"] < 0.1


def test_two_ranks_that_add_in_float32_move_less(llama: transformers.LlamaForCausalLM) -> None:
    prompt = [list(range(100))]
    served, exact = (
        residual.apart(residual.ask(llama, kept, prompt), residual.ask(llama, kept, prompt, "two ranks"))["mean"]
        for kept in (residual.Kept(), residual.KEPT["the halves of two ranks"])
    )
    assert exact < served


def test_every_innermost_entry_is_one_line() -> None:
    assert list(lines({"a": {"b": {"mean": 1.0}, "c": {"mean": 2.0}}})) == ["a, b: mean 1.0000", "a, c: mean 2.0000"]
