"""The collectives of a calibration's processes, and how these fail together."""

import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.data.conversations import CLASSES, Conversation, Media, Message, PlainText, Text
from calibration.data.token_choice import share_tokens
from calibration.output.distributions import observe
from calibration.processes import ONE, Processes
from calibration.quantize.layer import DrawnInput, QuantizedLayer, quantize_input
from calibration.quantize.massive_tokens import find_intervals, outlying_tokens
from calibration.quantize.observation import InputCollector
from calibration.settings.recipe import Recipe
from calibration.work.durable_files import FileRecord
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.inputs import AUDIO, MASSIVE, make_spec, matrix, with_massive
from tests.calibration.joined import in_processes, messages

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.bool)


def test_one_process_is_all_of_them() -> None:
    value = torch.arange(3.0)
    assert ONE.first and ONE.size == 1
    assert ONE.all_reduce(value, "SUM") is value
    assert ONE.all_gather_rows(value, torch.zeros(3)) is value
    assert ONE.all_gather("a") == ["a"] and ONE.broadcast(lambda: "b") == "b"
    assert ONE.share(7) == slice(0, 7)
    with pytest.raises(MorphoQuantError, match=r"^wrong$"), ONE.failing_together():
        raise MorphoQuantError("wrong")
    assert not ONE.failure_announced


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_shares_are_runs_that_make_up_the_whole(size: int, count: int) -> None:
    dealt = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        share = list(range(count))[processes.share(count)]
        assert (processes.owners(count) == rank).nonzero().flatten().tolist() == share
        assert len(share) in (count // size, -(-count // size))
        dealt += share
    assert dealt == list(range(count))


def united(processes: Processes) -> dict[str, Any]:
    own = torch.tensor([[1.0, 8.0], [-2.0, 0.5]])[processes.rank]
    before = own.clone()
    owner = torch.tensor([1, 0, 1, 1])
    rows = torch.arange(4)[owner == processes.rank]
    called = []
    found: dict[str, Any] = {
        "reduced": {operation: processes.all_reduce(own, operation).tolist() for operation in ("SUM", "MIN", "MAX")},
        "count": processes.all_reduce(torch.tensor(processes.rank + 1.0, dtype=torch.float64), "SUM").item(),
        "merged": {
            str(dtype): processes.all_gather_rows((rows[:, None] + torch.zeros(3)).to(dtype), owner).float().tolist()
            for dtype in DTYPES
        },
        # Process 0 has none of them.
        "one has all": processes.all_gather_rows(rows[: 2 * processes.rank].float(), torch.tensor([1, 1])).tolist(),
        "gathered": processes.all_gather({"rank": processes.rank, "tensor": torch.ones(processes.rank)}),
        "decided": processes.broadcast(lambda: called.append(1) or (processes.rank, torch.ones(2))),
        "calls": len(called),
    }
    assert torch.equal(own, before)
    return found


def test_what_two_processes_have_is_united(tmp_path: Path) -> None:
    results = in_processes(tmp_path, united)
    assert [result.pop("calls") for result in results] == [1, 0]
    for found in results:
        assert found["reduced"] == {"SUM": [-1.0, 8.5], "MIN": [-2.0, 0.5], "MAX": [1.0, 8.0]}
        assert found["count"] == 3.0
        for dtype, merged in found["merged"].items():
            wanted = [[float(row > 0) if dtype == "torch.bool" else float(row)] * 3 for row in range(4)]
            assert merged == wanted, dtype
        assert found["one has all"] == [0.0, 2.0]
        assert [part["rank"] for part in found["gathered"]] == [0, 1]
        assert [part["tensor"].numel() for part in found["gathered"]] == [0, 1]
        assert found["decided"][0] == 0 and torch.equal(found["decided"][1], torch.ones(2))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["reduce", "decide", "end"])
def test_what_fails_in_one_process_fails_in_all(tmp_path: Path, failing: int, where: str) -> None:
    """Wherever the other one is: in a call, waiting for a decision, or done."""

    def work(processes: Processes) -> None:
        try:
            with processes.failing_together():
                processes.all_reduce(torch.ones(2), "SUM")
                if processes.rank == failing:
                    raise MorphoQuantError("data.jsonl:3: its picture is broken")
                if where == "reduce":
                    processes.all_reduce(torch.ones(2), "SUM")
                elif where == "decide":
                    processes.broadcast(lambda: None)
        finally:
            assert processes.failure_announced

    expected = ["data.jsonl:3: its picture is broken"] * 2
    expected[1 - failing] = f"process {failing}: {expected[0]}"
    assert messages(in_processes(tmp_path, work)) == expected


def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        processes.all_reduce(torch.ones(2), "SUM")
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            processes.all_reduce(torch.ones(2), "SUM")
        finally:
            assert not processes.failure_announced

    start = time.monotonic()
    first, second = in_processes(tmp_path, work)
    assert second is None
    assert str(first).startswith("process 0: another process of this calibration has died or does not answer (")
    assert "\n" not in str(first)
    assert time.monotonic() - start < 20


def test_a_process_that_does_not_answer_ends_the_others(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 1:
            time.sleep(2.5)
        processes.all_reduce(torch.ones(2), "SUM")

    first, second = messages(in_processes(tmp_path, work, timeout=timedelta(seconds=1)))
    assert "process 0: another process of this calibration has died or does not answer" in first
    assert "process 1: another process of this calibration has died or does not answer" in second


def test_processes_that_make_different_calls_are_no_users_mistake(tmp_path: Path) -> None:
    def work(processes: Processes) -> str:
        try:
            processes.all_reduce(torch.ones(2 + processes.rank), "SUM")
        except AssertionError as error:
            return str(error)
        return ""

    assert all("but another rank does not" in said for said in in_processes(tmp_path, work))


# --- untrusted data


class Harm:
    """An object whose unpickling would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("call", ["gather", "decide"])
def test_what_another_process_sends_runs_no_code(tmp_path: Path, call: str) -> None:
    place = tmp_path / "harm"

    def work(processes: Processes) -> Any:
        with processes.failing_together():
            value = Harm(place) if processes.first else None
            return processes.all_gather(value) if call == "gather" else processes.broadcast(lambda: value)

    first, second = in_processes(tmp_path, work)
    assert "process 0 has sent data that do not belong to a calibration" in str(second)
    assert isinstance(first, MorphoQuantError), "the other ranks learn of the failure"
    assert not place.exists()


def test_a_class_is_taken_where_it_is_named(tmp_path: Path) -> None:
    media = tuple(Media("image", content, "a") for content in (Path("a.png"), b"\x00\xff" * 300, b""))
    sent = [Conversation("data.jsonl:1", (Message("user", (Text("ä\n"), *media)),)), PlainText("b.txt", "b")]

    def work(processes: Processes) -> Any:
        return processes.broadcast(lambda: sent, CLASSES), processes.broadcast(
            lambda: [FileRecord(1, "a")], [FileRecord]
        )

    assert in_processes(tmp_path, work) == [(sent, [FileRecord(1, "a")])] * 2
    unnamed = messages(in_processes(tmp_path, lambda processes: processes.all_gather([FileRecord(1, "a")])))
    assert all("do not belong to a calibration" in said for said in unnamed)


# --- distributed calibration of a layer

SHARDS = {"m.q": matrix(33), "m.k": matrix(16, 4)}
SAMPLES = 7


@dataclass
class Made:
    """The results of calibrating one input."""

    layers: dict[str, QuantizedLayer]
    positions: tuple[Tensor, ...]
    distribution: dict[str, Tensor]


def make(processes: Processes, recipe: Recipe) -> Made:
    """Two linears calibrated on 7 samples; each process has every size-th of them."""
    x, modality, outlying = with_massive()
    # A modality that is better off with a row of its own.
    modality[200:] = AUDIO
    x[200:][~outlying[200:]] *= 0.2
    x16 = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    rows = torch.where(outlying, MASSIVE, modality)
    samples = list(enumerate(zip(*(value.tensor_split(SAMPLES) for value in (x, x16, modality, rows)), strict=True)))
    own = samples[processes.rank :: processes.size]
    tokens = share_tokens(processes, {place: parts[2] for place, parts in own}, recipe.sample_tokens, 1.0, 0)
    collector, aims, outlying_parts = InputCollector("m.q", x[:0]), [x[:0]], [outlying[:0]]
    for index, (_, (part, aim, _, part_rows)) in zip(tokens.samples, own, strict=True):
        positions = tokens.positions[index]
        collector.add(part, part_rows, positions)
        aims.append(aim[positions])
        outlying_parts.append(part_rows[positions] == MASSIVE)
    sample = DrawnInput(collector.observation(processes), torch.cat(aims), torch.cat(outlying_parts))
    spec = make_spec(SHARDS)
    layers = quantize_input(sample, tokens, SHARDS, spec, recipe)
    return Made(layers, tokens.positions, observe(sample, tokens, layers["m.q"].tensors, spec))


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 2), ({}, 9), ({"grid": "reference", "tau": 1.0}, 2), ({"rounding": "nearest", "regression": False}, 2)],
    ids=["budget", "more processes than samples", "reference", "nearest"],
)
def test_processes_make_the_layer_that_one_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], count: int
) -> None:
    """All choices are the same; values from float32 sums in another order may differ, only at ties."""
    # So that every n-th token is taken of those of all.
    for place in (
        "quantize.grids.SEARCH_TOKENS",
        "quantize.layer_report.ERROR_TOKENS",
        "output.distributions.TOKENS",
        "quantize.modality_rows.ROW_TOKENS",
    ):
        monkeypatch.setattr(f"calibration.{place}", 60)
    recipe = Recipe(sample_tokens=300, **settings)
    whole = make(ONE, recipe)
    assert recipe.grid == "reference" or whole.layers["m.q"].figures.modality_rows["audio"].own
    found = in_processes(tmp_path, lambda processes: make(processes, recipe), count)
    for made in found:
        assert all(torch.equal(*pair) for pair in zip(made.positions, whole.positions, strict=True))
        for name, value in whole.distribution.items():
            # bfloat16 of a sum.
            same = torch.allclose(made.distribution[name].float(), value.float(), rtol=0.01 * ("dispersion" in name))
            assert same, name
        for name, layer in made.layers.items():
            expected, first = whole.layers[name], found[0].layers[name]
            assert expected.figures.massive_tokens > 0
            assert layer.figures == first.figures
            for tensor, value in layer.tensors.items():
                assert torch.equal(value, first.tensors[tensor]), f"{tensor} differs between processes"
            assert_close(layer.tensors, expected.tensors)
            assert layer.figures.escape_rate == pytest.approx(expected.figures.escape_rate, rel=1e-5)
            assert layer.figures.output_error == pytest.approx(expected.figures.output_error, rel=1e-2)
            assert layer.figures.modality_rows == expected.figures.modality_rows


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Output channels in which no code at a tie went the other way have the same codes and biases; few are not so."""
    for name in found.keys() - {"weight_codes", "weight_scale", "absorbed_bias"}:
        assert torch.equal(found[name], expected[name]), name
    same = torch.ones(found["weight_codes"].shape[0], dtype=torch.bool)
    for name in ("weight_codes", "weight_scale"):
        same &= (found[name] == expected[name]).flatten(1).all(1)
    assert float(same.float().mean()) > 0.7
    ours, theirs = (tensors["absorbed_bias"][..., same] for tensors in (found, expected))
    # float32 means of values up to some hundreds.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_token_is_massive_among_those_of_all_processes(tmp_path: Path) -> None:
    """The second has 3 of 43 tokens, by itself an even lot."""
    norms = (torch.ones(40), torch.full((3,), 50.0))

    def work(processes: Processes) -> list[bool]:
        own = norms[processes.rank]
        found: list[bool] = outlying_tokens(own, torch.zeros(own.numel(), dtype=torch.int32), processes).tolist()
        return found

    assert in_processes(tmp_path, work) == [[False] * 40, [True] * 3]


def test_intervals_are_judged_on_the_tokens_of_all_processes(tmp_path: Path) -> None:
    """By its own tokens the second would take channel 0 first; of all, fewer lie inside on channel 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 8, generator=generator)
    x[:, :6, :2] = 40 + torch.randn(2, 6, 2, generator=generator)
    massive = torch.arange(300).expand(2, -1) < 6
    x[0, 100:104, 0] = x[1, 100:102, 1] = 40.0
    whole = find_intervals(x.flatten(0, 1), massive.flatten(), 1)
    assert whole.channel[0, :2].tolist() == [1, 0]
    work = lambda processes: find_intervals(x[processes.rank], massive[processes.rank], 1, processes)  # noqa: E731
    for found in in_processes(tmp_path, work):
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))
