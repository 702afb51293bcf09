"""benchmarks.cpu_linear: right outputs of the compared linears, equal conditions, and faithful reports."""

import json
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_linear.__main__ import parser, run
from benchmarks.cpu_linear.instructions import measure
from benchmarks.cpu_linear.layers import MODELS, generated
from benchmarks.cpu_linear.measure import interleaved
from benchmarks.cpu_linear.report import write
from benchmarks.cpu_linear.ways.heads import HEADS, head_bytes, heads
from benchmarks.cpu_linear.ways.peers import linears
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu.build import cpu_flags, instruction_sets
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics import linear

OUTPUTS, CHANNELS, TOKENS = 64, 256, 6


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")


def test_ours_is_the_reference_on_rows_that_differ() -> None:
    ways, _ = linears(OUTPUTS, CHANNELS, [32, 128], TOKENS)
    x = torch.randn(TOKENS, CHANNELS).bfloat16()
    for group_size in (32, 128):
        weight, record = generated(OUTPUTS, CHANNELS, group_size, 1)
        expected = linear.linear(x, torch.arange(TOKENS, dtype=torch.int32) % 5, weight, record)
        # bfloat16 of a float32 sum.
        torch.testing.assert_close(ways[f"MorphoQuant G={group_size}"](x), expected, rtol=2**-7, atol=1e-3)


def test_each_way_gives_outputs_of_its_shape_or_a_reason_why_not() -> None:
    ways, left_out = linears(OUTPUTS, CHANNELS, [64], TOKENS)
    x = torch.randn(TOKENS, CHANNELS).bfloat16()
    for way in ways.values():
        y = way(x)
        assert y.shape == (TOKENS, OUTPUTS) and y.dtype is torch.bfloat16 and bool(y.isfinite().all())
    assert len(ways) + len(left_out) == 9


def test_each_way_of_a_head_is_the_same_product_or_left_out() -> None:
    ways, left_out = heads(OUTPUTS, CHANNELS)
    assert ways.keys() <= head_bytes(OUTPUTS, CHANNELS).keys() and len(ways) + len(left_out) == 3
    x = torch.randn(TOKENS, CHANNELS).bfloat16()
    made = {name: way(x) for name, way in ways.items()}
    assert all(y.shape == (TOKENS, OUTPUTS) and y.dtype is torch.bfloat16 for y in made.values())
    if "MorphoQuant bf16" in made:
        # 8-bit codes: a few thousandths of the outputs' size, which is about 16.
        torch.testing.assert_close(made["MorphoQuant bf16"], made["MorphoQuant int8"], rtol=0.02, atol=1.0)


def test_the_scales_that_onednn_reads_by_address_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    make, handed = _custom_ops.create_onednn_scaled_mm, []

    def noted(weight: torch.Tensor, scale: torch.Tensor, *others: object) -> object:
        handed.append(weakref.ref(scale))
        return make(weight, scale, *others)

    monkeypatch.setattr(_custom_ops, "create_onednn_scaled_mm", noted)
    ways, _ = linears(OUTPUTS, CHANNELS, [64], TOKENS)
    assert ("oneDNN W8A8" in ways) == bool([scale for scale in handed if scale() is not None])


def test_every_way_is_timed_equally_often() -> None:
    calls = {"a": 0, "b": 0}

    def count(name: str) -> None:
        calls[name] += 1

    found = interleaved({"a": lambda: count("a"), "b": lambda: count("b")}, budget=0.0, least=4)
    assert calls == {"a": 5, "b": 5} and found["a"]["runs"] == 4


def test_every_layer_takes_every_group_size() -> None:
    for shapes in MODELS.values():
        assert all(channels % 128 == 0 for _, channels in shapes.values())


def test_the_files_hold_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "bars", {"small": (OUTPUTS, CHANNELS)})
    for name in list(HEADS):
        monkeypatch.setitem(HEADS, name, (OUTPUTS, CHANNELS))
    monkeypatch.setattr("benchmarks.cpu_linear.__main__.ROWS_SHAPE", (OUTPUTS, CHANNELS))
    monkeypatch.setattr("benchmarks.cpu_linear.peak.READ_BYTES", 1 << 20)
    monkeypatch.setattr("benchmarks.cpu_linear.peak.DOT_ROUNDS", 1000)
    monkeypatch.setattr("benchmarks.cpu_linear.instructions.instruction_sets", lambda flags: ["avx2"])
    threads = torch.get_num_threads()
    arguments = parser().parse_args(["--tokens", "1", "8", "--threads", "1", "--seconds", "0", "--pairs", "10"])
    summary = run(arguments, "command")
    torch.set_num_threads(threads)
    files = write(summary, tmp_path, "cpu")
    assert [path.name for path in files] == ["cpu.json", "cpu.md", "cpu.png", "cpu-tables.md"]
    assert json.loads(files[0].read_text()) == summary
    short, text = (path.read_text() for path in (files[1], files[3]))
    taken = summary["linears"][0]["points"][0]["times"]["MorphoQuant G=32"]["median"]
    assert f"\n| MorphoQuant G=32 | {taken * 1e6:.0f} (" in short
    assert "report --name cpu`" in short
    for point in summary["linears"][0]["points"]:
        assert f"| MorphoQuant G=32 | {point['times']['MorphoQuant G=32']['median'] * 1e6:.0f} (" in text
    for point in summary["heads"][0]["points"]:
        assert f"| MorphoQuant int8 | {point['times']['MorphoQuant int8']['median'] * 1e6:.0f} (" in text
    assert f"{summary['rows'][0]['ratio']:.3f}" in short and "| 10 |" in short
    assert f"| {summary['pages'][0]['ratio']:.2f} |" in short
    assert [case["tokens"] for case in summary["instruction_sets"]] == [1, 8]
    table = [line for line in short[short.index("## Instruction sets") :].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "as many cells in each line"
    assert f"| {summary['instruction_sets'][0]['times']['avx2']['median'] * 1e6:.0f} µs (1.00) |" in short
    assert all(ceiling["gb_s"] > 0 and ceiling["gmac_s"] > 0 for ceiling in summary["ceilings"].values())


@pytest.mark.full
def test_each_number_of_threads_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process oneDNN stays with the threads of its first call: at 2 it was measured on 1."""
    monkeypatch.setitem(MODELS, "bars", {"small": (OUTPUTS, CHANNELS)})
    monkeypatch.setattr("benchmarks.cpu_linear.peak.READ_BYTES", 1 << 20)
    monkeypatch.setattr("benchmarks.cpu_linear.peak.DOT_ROUNDS", 1000)
    before = torch.get_num_threads()
    assert before == 1
    settings = ["--tokens", "1", "--threads", "1", "2", "--group-sizes", "64", "--seconds", "0"]
    summary = run(parser().parse_args(["linears", *settings]), "command")
    assert [case["threads"] for case in summary["linears"]] == [1, 2]
    assert torch.get_num_threads() == before, "nothing was measured here"


@pytest.mark.full
def test_every_instruction_set_has_its_own_kernels() -> None:
    found = measure(1, OUTPUTS, CHANNELS, 32, (1, 3), seconds=0.0)
    assert [case["tokens"] for case in found] == [1, 3]
    for case in found:
        assert list(case["times"]) == instruction_sets(cpu_flags())
        assert all(time["runs"] == case["pairs"] for time in case["times"].values())


@pytest.mark.full
def test_a_worker_that_cannot_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cpu_linear.instructions.instruction_sets", lambda flags: ["none"])
    with pytest.raises(MorphoQuantError, match="the process with the none kernels ended; its output says why"):
        measure(1, OUTPUTS, CHANNELS, 32, (1,), seconds=0.0)
