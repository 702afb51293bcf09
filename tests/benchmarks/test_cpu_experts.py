"""benchmarks.cpu_experts: right outputs of both ways, fresh routing that both share, and a faithful report."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_experts.__main__ import parser, run
from benchmarks.cpu_experts.measure import timed
from benchmarks.cpu_experts.report import markdown, write
from benchmarks.cpu_experts.ways import BFLOAT16, Way, bfloat16, bfloat16_isa, ours
from benchmarks.models.routed import Layer, generated, routing
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.numerics.experts import experts

LAYER, TOKENS = Layer("small", 6, 2, 128, 64), 9


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, LAYER.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    return x, *routing(TOKENS, LAYER, torch.Generator().manual_seed(4))


@pytest.mark.parametrize("two_level", [False, True])
def test_ours_is_the_reference_on_rows_that_differ(two_level: bool) -> None:
    record = generated(LAYER, 32, two_level)
    modality = torch.arange(TOKENS, dtype=torch.int32) % 5
    expected = experts(given()[0], modality, *given()[1:], record)
    way = ours(LAYER, 32, two_level, TOKENS)
    # A gate or up that rounds to the neighbouring bfloat16 may change a code of down's input.
    torch.testing.assert_close(way.run(*given()), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_vllms_way_is_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    taken = []
    pack = _custom_ops.cpu_prepack_moe_weight
    monkeypatch.setattr(
        _custom_ops, "cpu_prepack_moe_weight", lambda weight, isa: (taken.append(weight), pack(weight, isa))[1]
    )
    way = bfloat16(LAYER, bfloat16_isa())
    x, weights, ids = given()
    expected = torch.zeros(TOKENS, LAYER.hidden)
    for token in range(TOKENS):
        for weight, index in zip(weights[token], ids[token], strict=True):
            gate, up = (taken[0][index].float() @ x[token].float()).chunk(2)
            expected[token] += weight * (taken[1][index].float() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(way.run(x, weights, ids).float(), expected, rtol=0.05, atol=0.02)
    assert way.size == 6 * 3 * 128 * 64 * 2


def test_each_round_has_fresh_routing_that_all_ways_share() -> None:
    calls: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def noted(name: str) -> Way:
        return Way(lambda x, weights, ids: (calls[name].append(ids), x)[1], 0)

    found = timed({name: noted(name) for name in calls}, LAYER, 3, 0.0, least=4)
    assert found["a"]["runs"] == found["b"]["runs"] == 4 and len(calls["a"]) == 5
    for first, second in zip(calls["a"], calls["b"], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(calls["a"][0], calls["a"][1])


def test_a_token_chooses_different_experts_whose_weights_add_up_to_1() -> None:
    weights, ids = routing(50, LAYER, torch.Generator().manual_seed(0))
    assert weights.dtype is torch.float32 and ids.dtype is torch.int32
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert bool((ids[:, 0] != ids[:, 1]).all()) and set(ids.flatten().tolist()) == set(range(6))


def test_the_files_hold_what_was_measured_and_mark_what_misses_a_bar(tmp_path: Path) -> None:
    arguments = parser().parse_args(["--tokens", "1", "8", "--threads", "1", "--seconds", "0"])
    summary = run(arguments, "command", LAYER)
    files = write(summary, tmp_path, "experts")
    assert [path.name for path in files] == ["experts.json", "experts.md", "experts.png"]
    assert json.loads(files[0].read_text()) == summary
    assert f"vLLM's isa `{bfloat16_isa()}`" in files[1].read_text()
    assert list(summary["bytes"]) == [BFLOAT16, "MorphoQuant G=32", "MorphoQuant G=32 two-level"]
    # Small layers have relatively large input tensors.
    assert "| **no** |" in files[1].read_text()
    summary["bytes"]["MorphoQuant G=32"] = 0.3 * summary["bytes"][BFLOAT16]
    times = summary["points"][0]["times"]
    for speed, word in ((3.01, "yes"), (2.99, "**no**")):
        times["MorphoQuant G=32"]["median"] = times[BFLOAT16]["median"] / speed
        line = next(line for line in markdown(summary).splitlines() if line.startswith("| MorphoQuant G=32 |"))
        assert line.endswith(f"| {word} |") and f", {speed:.2f} x" in line
