import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.decisions import cost, layers, report, sizes, summary
from benchmarks.decisions import inputs as inputs_module
from benchmarks.decisions.inputs import LinearInput, generated_input, real_inputs
from benchmarks.decisions.layers import Variant, measure
from calibration.quantize import step_search
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec, tensor_specs
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from morphoquant_vllm.numerics.activation import act_quant, token_rows
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def tiny() -> LinearInput:
    return generated_input(128, 32, tokens=1024, held_out=256, seed=0)


@pytest.fixture(scope="module")
def offset(tiny: LinearInput) -> LinearInput:
    """Channels that lie far from 0, and every 64th token unlike the others."""
    shift = torch.linspace(-6, 6, 128)

    def change(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outlying = torch.arange(x.shape[0]) % 64 == 0
        changed = x + shift * tiny.calibration.std(0)
        changed[outlying] = changed[outlying] * 0.01 + 300 * torch.sign(shift)
        return changed, outlying

    calibration, held_out = change(tiny.calibration), change(tiny.held_out)
    return replace(
        tiny,
        calibration=calibration[0],
        calibration_outlying=calibration[1],
        held_out=held_out[0],
        held_out_outlying=held_out[1],
    )


def test_generated_input_is_seeded_and_has_its_outliers_and_tails(tiny: LinearInput) -> None:
    again = generated_input(128, 32, tokens=1024, held_out=256, seed=0)
    assert torch.equal(tiny.held_out, again.held_out)
    assert not torch.equal(tiny.held_out, generated_input(128, 32, tokens=1024, held_out=256, seed=1).held_out)
    deviation = tiny.calibration.std(0)
    # Sizes besides spread by e^0.5: a factor of 10 from the median is an outlier of 20 to 60, and nothing else.
    assert int((deviation > 10 * deviation.median()).sum()) in range(6, inputs_module.OUTLIER_CHANNELS + 1)
    scaled = tiny.calibration / deviation
    assert float(scaled.pow(4).mean()) > 3.3  # a normal distribution has 3


def test_smaller_groups_lose_less_and_every_result_is_small(tiny: LinearInput) -> None:
    errors = {size: measure(tiny, Variant(group_size=size))[0].error for size in (32, 128)}
    assert 0 < errors[32] < errors[128] < 0.3


def test_error_is_that_of_the_stored_tensors(tiny: LinearInput, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exact(torch.nn.Module):
        def __init__(self, *_: object) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ next(iter(tiny.weights.values())).T * 1.25

        def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full(x.shape, 9, dtype=torch.int8), torch.zeros(x.shape[0], dtype=torch.int32)

    monkeypatch.setattr(layers, "ServedLinear", Exact)
    result = measure(tiny, Variant())[0]
    assert result.error == pytest.approx(0.25, rel=1e-5) and result.escape_rate == 1.0


def test_centres_matter_where_channels_have_one(offset: LinearInput) -> None:
    before = (step_search.centres, step_search.losses, step_search.budget_grid)
    real, integer, none = (measure(offset, Variant(centre=kind))[0] for kind in layers.CENTRES)
    assert (step_search.centres, step_search.losses, step_search.budget_grid) == before
    assert real.centred_share > 0.9 and none.centred_share == 0
    # A whole number of steps is near the middle, 0 is not.
    assert max(real.error, integer.error) < none.error and integer.error != real.error


def test_integer_centres_are_whole_numbers_of_steps(offset: LinearInput) -> None:
    x = offset.calibration[1:64]
    with layers._centres("integer"):
        weight = torch.full((63,), 1 / 63)
        grid = step_search.budget_grid(
            iter([(x, weight, weight[:, None])]), step_search.centres(x), x.amin(0), x.amax(0), torch.ones(128), 0.04
        )
    codes = grid.centre / grid.step
    # A quotient of float32s about 100 is exact to 1e-5.
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert bool((codes.round() != 0).any())


def test_massive_row_is_what_massive_tokens_need(offset: LinearInput) -> None:
    on, off = (measure(offset, Variant(massive_row=flag))[0] for flag in (True, False))
    assert (on.found, on.false, on.massive_tokens) == (1.0, 0.0, 4) and off.found == 0.0
    assert on.error < off.error
    table = summary.massive([on, off], held_out_tokens=256)
    assert [row["share"] for row in table] == [4 / 256]
    assert table[0]["other_error"] == {"on": pytest.approx(on.error), "off": pytest.approx(off.error)}


def test_unknown_centre_and_group_size(tiny: LinearInput) -> None:
    with pytest.raises(MorphoQuantError, match="centre 'odd' is unknown; known: real, integer, none"):
        measure(tiny, Variant(centre="odd"))
    assert layers.allows(576, 64) and not layers.allows(576, 128) and not layers.allows(576, 48)


def test_real_inputs_are_what_the_linears_read(tmp_path: Path) -> None:
    directory = build_tiny_llama(tmp_path / "llama")
    windows = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    found = real_inputs(directory, [0, 1], windows[:2], windows[2:])
    assert [(own.name, own.in_features) for own in found[:4]] == [
        ("blocks.0.self_attn.qkv_proj", 128),
        ("blocks.0.self_attn.o_proj", 128),
        ("blocks.0.mlp.gate_up_proj", 128),
        ("blocks.0.mlp.down_proj", 256),
    ]
    assert all(own.calibration.shape[0] == 80 and own.held_out.shape[0] == 40 for own in found)
    gate_up, down = found[6:]
    gate, up = (gate_up.held_out @ weight.T for weight in gate_up.weights.values())
    # The order of float32 sums over 128 products.
    torch.testing.assert_close(torch.nn.functional.silu(gate) * up, down.held_out, rtol=1e-4, atol=1e-4)
    with pytest.raises(MorphoQuantError, match=r"block 2: .* has blocks 0 to 1"):
        real_inputs(directory, [2], windows, windows)


def test_cost_compares_the_same_codes_and_a_check_that_finds_tokens() -> None:
    record = cost.make_record(64, 0, ordered=False)
    x = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 1] = math.nan, math.inf
    x[2, record.massive_channel[0].long()] = 55.0
    rows = token_rows(x, torch.zeros(5, dtype=torch.int32), record)
    assert rows.tolist() == [0, 0, len(DEFAULT_ROWS) - 1, 0, 0]
    assert torch.equal(cost.without_gather(x, rows, record), act_quant(x, rows, record))
    ordered = cost.make_record(64, 0, ordered=True)
    assert not torch.equal(ordered.channel_order, record.channel_order)


def test_interleaved_runs_every_way_equally_often_in_turns() -> None:
    calls: list[str] = []
    times = cost.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, runs=6)
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(calls[at : at + 3]) for at in range(0, len(calls), 3)]
    assert set(rounds) == {"abc", "bca", "cab"}
    assert cost.spread([1.0, 2.0, 3.0])["median"] == 2.0


def test_bytes_add_up_to_what_the_format_stores() -> None:
    layer = LayerSpec(18944, 3584, 128, "row", "down")
    own = sizes.layer_bytes(layer)
    stored = sum(
        spec.dtype.itemsize * math.prod(spec.shape)
        for spec in tensor_specs(layer, len(DEFAULT_ROWS), sizes.TENSOR_PARALLEL).values()
    )
    named = ("weight_codes", "weight_scale", "step_and_order", "one_row", "other_rows", "massive")
    assert sum(own[name] for name in named) == own["total"] == stored
    # By hand: 4 bits a weight; 2 bytes a group, or 1 and 4 for each of the 3584 outputs.
    assert own["weight_codes"] == 18944 * 3584 // 2
    assert (own["weight_scale"], own["two_level_scale"]) == (2 * 148 * 3584, (148 + 4) * 3584)


def test_ratios_are_of_the_same_linears(tiny: LinearInput, tmp_path: Path) -> None:
    first = measure(tiny, Variant())[0]
    other = replace(first, layer="b", error=4 * first.error)
    coarse = Variant(group_size=128)
    results = [first, other, replace(first, variant=coarse, error=2 * first.error)]
    compared = summary.compare(results, coarse)
    assert compared["linears"] == 1 and compared["ratio"]["mean"] == pytest.approx(2)
    assert summary.mean([first.error, other.error]) == pytest.approx(2 * first.error)
    table = report._scales("Tiny", summary.scales(results))
    assert f"| 128 | free | 1 | {2 * first.error:.4f} | 2.000 (2.000 to 2.000) |" in table
    assert json.dumps(first.to_dict()).startswith('{"layer": "generated.128x32", "group_size": 32')
