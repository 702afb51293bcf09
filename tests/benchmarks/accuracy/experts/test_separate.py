"""Experts as linears do what transformers' merged ones do."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.accuracy import simulation
from benchmarks.accuracy.baselines.weights import rtn_int4
from benchmarks.accuracy.experts.separate import SeparateExperts, experts_of, separate
from benchmarks.accuracy.methods import EXPERTS, METHODS, Simulated
from benchmarks.models import decoder
from tests.tiny_experts import build_tiny_qwen3_moe

TOKENS = torch.randint(0, 200, (6, 24), generator=torch.Generator().manual_seed(0))
SAMPLES = [{"input_ids": ids[None]} for ids in TOKENS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_separate_experts_give_the_merged_ones_output_and_hold_their_memory(source: Path) -> None:
    model = decoder.load(source)
    merged, before = experts_of(model)["model.layers.0.mlp.experts"], logits(model)
    pointer = merged.down_proj.data_ptr()
    separate(model)
    # Only the order of float32 sums differs; logits have a deviation of about 4.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-3)
    experts = experts_of(model)
    assert list(experts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(isinstance(module, SeparateExperts) for module in experts.values())
    assert experts["model.layers.0.mlp.experts"].get_parameter("0.down_proj.weight").data_ptr() == pointer


def test_each_expert_is_calibrated_on_the_tokens_that_chose_it(source: Path) -> None:
    model = decoder.load(source)
    separate(model)
    blocks = decoder.blocks_of(model, source)
    groups, _ = decoder.observe(blocks[0], 0, decoder.capture(model, blocks, SAMPLES))
    gate_up = [group for group in groups if group.names[0].endswith("gate_proj")]
    assert [group.names for group in gate_up] == [
        (f"mlp.experts.{expert}.gate_proj", f"mlp.experts.{expert}.up_proj") for expert in range(4)
    ]
    # Two experts for each token.
    assert sum(len(x) for group in gate_up for x in group.inputs) == 2 * TOKENS.numel()


def test_an_expert_without_tokens_is_rounded_plainly(source: Path) -> None:
    method = METHODS["w4a16-gptq-g32"]
    assert isinstance(method, Simulated)
    weights = {"down_proj": torch.randn(8, 64, generator=torch.Generator().manual_seed(0))}
    inputs = [torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 64)]
    alone, activation = simulation.fit(method, [], weights, seed=0)
    assert activation is None
    assert torch.equal(alone["down_proj"], rtn_int4(weights["down_proj"], 32))
    assert not torch.equal(alone["down_proj"], simulation.fit(method, inputs, weights, seed=0)[0]["down_proj"])


def test_linears_that_no_sample_reached_are_groups_without_inputs(source: Path) -> None:
    model = decoder.load(source)
    separate(model)
    blocks = decoder.blocks_of(model, source)
    # One token reaches two experts of four.
    groups, _ = decoder.observe(blocks[0], 0, decoder.capture(model, blocks, [{"input_ids": TOKENS[:1, :1]}]))
    assert sum(len(group.names) for group in groups if not group.inputs) == 2 * 3
    assert sorted(name for group in groups for name in group.names) == sorted(decoder.linears_of(blocks[0]))


@pytest.mark.parametrize("name", [name for name in EXPERTS if isinstance(METHODS[name], Simulated)])
def test_every_method_runs_on_experts_and_all_but_16_bit_change_them(source: Path, name: str) -> None:
    model, plain = decoder.load(source), decoder.load(source)
    for each in (model, plain):
        separate(each)
    method = METHODS[name]
    assert isinstance(method, Simulated)
    simulation.apply(model, decoder.blocks_of(model, source), method, SAMPLES if method.calibrated else [])
    found, wanted = logits(model), logits(plain)
    assert bool(found.isfinite().all()) and torch.equal(found, wanted) == (name == "16bit")
    weight = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(model.get_parameter(weight), plain.get_parameter(weight)) == (name == "16bit")
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(model.get_parameter(gate), plain.get_parameter(gate))
