"""A calibration by several processes: the checkpoint of one process, resumed to the byte, one message if it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration.blocks.loop import BlockResult
from calibration.calibrate import calibrate
from calibration.processes import Processes
from calibration.settings.recipe import Recipe
from calibration.work.directory import WorkDirectory
from calibration.work.hidden_states import DiskInput
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.calibration.joined import free_port, in_processes, messages
from tests.calibration.killing import content

SMALL = Recipe(device="cpu", sample_tokens=64)
TURNS = (
    "Two rivers meet below the old town.",
    "Where is the market held, and on which days of the week can one buy fish there?",
    "Bread.",
    "The bridge was built of stone after the flood, and it still stands.",
    "Ask the miller.",
)
# Chosen values; the others depend on sums.
CHOSEN = ("activation_step", "centre", "gain", "channel_order", "modality_mask", "massive_channel", "massive_low")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five conversations: three for the first of two processes, two for the other."""
    path = tmp_path_factory.mktemp("texts") / "data.jsonl"
    lines = ({"messages": [{"role": "user", "content": turn}]} for turn in TURNS)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def call(model: Path, data: Path, output: Path, recipe: Recipe = SMALL, **options: Any) -> Callable[[Processes], Any]:
    """The call of each process."""
    return lambda processes: calibrate(model, data, output, recipe=recipe, processes=processes, **options)


def stop(result: BlockResult) -> None:
    raise MorphoQuantError("stopped")


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    return {name: value for path in checkpoint.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_like_one(ours: Path, one: Path, first: str = "layers.0.self_attn.q_proj") -> None:
    """Of the `first` input all that is chosen is the same; later ones see other last bits, so errors are compared.

    A code at a tie goes the other way, and what comes after it sees other activations: 1 and 2 threads differ so too.
    """
    assert verify_checkpoint(ours).layers == verify_checkpoint(one).layers
    found, expected = tensors_of(ours), tensors_of(one)
    assert found.keys() == expected.keys()
    for name in CHOSEN:
        (tensor,) = (tensor for tensor in expected if tensor.endswith(f"{first}.{name}"))
        assert torch.equal(found[tensor], expected[tensor]), tensor
    (codes,) = (name for name in expected if name.endswith(f"{first}.weight_codes"))
    assert float((found[codes] != expected[codes]).float().mean()) < 0.03
    mine, theirs = (json.loads((path / "morphoquant_calibration.json").read_text()) for path in (ours, one))
    assert mine["data"] == theirs["data"] and mine["settings"] == theirs["settings"]
    assert mine["escape_rate"] == pytest.approx(theirs["escape_rate"], abs=0.005)
    for name, layer in theirs["layers"].items():
        assert mine["layers"][name]["output_error"] == pytest.approx(layer["output_error"], rel=0.3), name


def test_two_processes_make_the_checkpoint_of_one(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    calibrate(tiny.model("llama"), texts, tmp_path / "one", recipe=SMALL)
    for name, data in expected.items():
        path = tmp_path / "two" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert_like_one(tmp_path / "two", tmp_path / "one")


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "first"),
    [({"towers": ("image",)}, "blocks.0.attn.q"), ({"grid": "reference"}, "layers.0.self_attn.q_proj")],
    ids=["tower", "reference"],
)
def test_two_processes_calibrate_an_omni_model(
    tiny: TinyModels, tmp_path: Path, settings: dict[str, Any], first: str
) -> None:
    model, data, recipe = tiny.model("omni"), tiny.data("omni"), Recipe(device="cpu", **settings)
    report = calibrate(model, data, tmp_path / "one", recipe=recipe)
    results = in_processes(tmp_path, call(model, data, tmp_path / "two", recipe))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert results[0] == results[1] == json.loads((tmp_path / "two" / "morphoquant_calibration.json").read_text())
    assert results[0]["data"] == report["data"]
    assert_like_one(tmp_path / "two", tmp_path / "one", first)


@pytest.mark.full
@pytest.mark.parametrize("samples", [5, 1], ids=["", "one without samples"])
def test_two_processes_calibrate_a_mixture_of_experts(
    tiny: TinyModels, texts: Path, tmp_path: Path, samples: int
) -> None:
    model, recipe = tiny.model("qwen3_moe"), SMALL.model_copy(update={"max_samples": samples})
    report = calibrate(model, texts, tmp_path / "one", recipe=recipe)
    results = in_processes(tmp_path, call(model, texts, tmp_path / "two", recipe))
    assert results[0] == results[1]
    assert_like_one(tmp_path / "two", tmp_path / "one")
    for name, figures in report["experts"].items():
        found = results[0]["experts"][name]
        # A token near the border between two experts may choose the other one.
        assert sum(found["tokens"]) == sum(figures["tokens"])
        assert found["drawn_tokens"] == pytest.approx(figures["drawn_tokens"], abs=8)
        for kind in ("gate_up_error", "down_error"):
            assert found[kind] == pytest.approx(figures[kind], rel=0.3), name


def test_a_process_without_samples_takes_part(tiny: TinyModels, texts: Path, tmp_path: Path) -> None:
    recipe = SMALL.model_copy(update={"max_samples": 1})
    calibrate(tiny.model("llama"), texts, tmp_path / "one", recipe=recipe)
    in_processes(tmp_path, call(tiny.model("llama"), texts, tmp_path / "two", recipe))
    assert_like_one(tmp_path / "two", tmp_path / "one")


# --- resuming


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModels, texts: Path) -> dict[str, bytes]:
    """The checkpoint of an uninterrupted run of two processes."""
    directory = tmp_path_factory.mktemp("expected")
    results = in_processes(directory, call(tiny.model("llama"), texts, directory / "out"))
    assert len(results[0]["layers"]) == 14
    return content(directory / "out")


def killed(tiny: TinyModels, texts: Path, directory: Path, rank: int, step: int, expected: dict[str, bytes]) -> None:
    """A run in which one process is killed before a step, and the same command again."""
    work = call(tiny.model("llama"), texts, directory / "out")
    results = in_processes(directory, work, kill=(rank, step))
    assert results[rank] is None
    (other,) = messages([results[1 - rank]])
    assert "another process of this calibration has died" in other
    in_processes(directory, work)
    assert content(directory / "out") == expected
    assert [path.name for path in directory.iterdir()] == ["out"]


# Of the first: while it takes hold of the work, in its first block, in its second.
@pytest.mark.parametrize(("rank", "step"), [(0, 22), (1, 5)])
def test_the_same_command_goes_on_after_a_kill(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes], rank: int, step: int
) -> None:
    killed(tiny, texts, tmp_path, rank, step, expected)


@pytest.mark.full
@pytest.mark.parametrize(("rank", "steps"), [(0, 45), (1, 10)])
def test_the_same_command_goes_on_after_a_kill_before_any_step(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes], rank: int, steps: int
) -> None:
    for step in range(steps):
        (tmp_path / str(step)).mkdir()
        killed(tiny, texts, tmp_path / str(step), rank, step, expected)


def test_states_on_disk_and_a_stop_change_no_byte(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = WorkDirectory.inputs

    def on_disk(self: WorkDirectory, *, in_memory: bool) -> Any:
        found = inputs(self, in_memory=False)
        assert {type(entry) for entry in found} == {DiskInput}
        return found

    monkeypatch.setattr(WorkDirectory, "inputs", on_disk)
    model, data, output = tiny.model("llama"), texts, tmp_path / "out"
    said = messages(in_processes(tmp_path, call(model, data, output, on_block=stop)))
    assert said == ["stopped", "process 0: stopped"] or said == ["stopped", "stopped"]
    names = {path.name for path in (tmp_path / "out.work").iterdir()}
    assert {"served-00001.safetensors", "served-00001-process1.safetensors", "sample-00004.safetensors"} <= names
    before = content(tmp_path / "out.work")
    with pytest.raises(MorphoQuantError, match=r"out\.work: was begun with .*processes was 2, now 1"):
        calibrate(model, data, output, recipe=SMALL)
    first, *others = messages(in_processes(tmp_path, call(model, data, output), 3))
    assert "processes was 2, now 3" in first and "\n" not in first
    assert others == [f"process 0: {first}"] * 2
    assert content(tmp_path / "out.work") == before
    path = tmp_path / "out.work" / "served-00001-process1.safetensors"
    path.write_bytes(before[path.name][:-1])
    first, _ = messages(in_processes(tmp_path, call(model, data, output)))
    # Found by the first, before any work.
    assert first.startswith(f"{path}: cannot be used")
    path.write_bytes(before[path.name])
    in_processes(tmp_path, call(model, data, output))
    assert content(output) == expected


# --- failures


def test_a_bad_sample_of_one_process_is_one_line_in_all(tiny: TinyModels, tmp_path: Path) -> None:
    """The second conversation is the second process's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    bad = {"type": "image_url", "image_url": {"url": "broken.png"}}
    lines = ['{"messages": [{"role": "user", "content": "Where is the market?"}]}'] * 3
    lines[1] = json.dumps({"messages": [{"role": "user", "content": [bad]}]})
    data = tmp_path / "data" / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    first, second = messages(in_processes(tmp_path, call(tiny.model("omni"), data, tmp_path / "out")))
    assert re.search(r"data\.jsonl:2.*broken\.png", second)
    assert first == second, "every process names it"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    report, _ = in_processes(tmp_path, call(tiny.model("omni"), data, tmp_path / "out", skip_bad=True))
    assert report["data"]["samples"] == 2


def test_a_budget_is_shared_by_the_processes_of_a_machine(tiny: TinyModels, texts: Path, tmp_path: Path) -> None:
    """Memory that is enough for one process is too little for two."""
    model, data = tiny.model("llama"), texts
    calibrate(model, data, tmp_path / "one", recipe=SMALL, memory_budget=2**30)
    work = call(model, data, tmp_path / "out", memory_budget=2**30)
    first, _ = messages(in_processes(tmp_path, work))
    assert "does not fit --memory-budget 0.50GiB" in first
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# --- torchrun itself


def torchrun(model: Path, data: Path, output: Path, *options: object) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "calibration", "calibrate", model, "--data", data, "--output", output, "--device", "cpu"),
        *("--sample-tokens", "64", *options),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_makes_the_checkpoint_of_the_same_processes(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = torchrun(tiny.model("llama"), texts, tmp_path / "out")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines()[0] == f"{tmp_path / 'out'}: 14 layers quantized, escape rate {rate(expected):.2%}"
    assert out.count("layers quantized") == out.count("vllm serve") == 1, "one process speaks"
    assert err.count("block 2/2") == 1 and err.count("calibration data: 5 samples") == 1
    assert content(tmp_path / "out") == expected


def rate(checkpoint: dict[str, bytes]) -> float:
    return float(json.loads(checkpoint["morphoquant_calibration.json"])["escape_rate"])


@pytest.mark.full
def test_torchrun_calibrates_an_omni_model(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny.model("omni"), tiny.data("omni")
    calibrate(model, data, tmp_path / "one", recipe=SMALL)
    process = torchrun(model, data, tmp_path / "two")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_like_one(tmp_path / "two", tmp_path / "one")


@pytest.mark.full
def test_torchrun_says_once_what_is_wrong(tiny: TinyModels, texts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n{\n')
    process = torchrun(tiny.model("llama"), data, tmp_path / "out")
    _, err = process.communicate()
    assert process.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        line for line in err.splitlines() if "data.jsonl:2: not JSON" in line
    ]
    assert err.count("error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.full
def test_torchrun_goes_on_after_a_worker_was_killed(
    tiny: TinyModels, texts: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    process = torchrun(tiny.model("llama"), texts, tmp_path / "out")
    work = tmp_path / "out.work"
    while not (work / "block-00000.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode != 0
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert re.search("another process of this calibration has died|SIGTERM, which torchrun sends", line)
    # torchrun itself prints another traceback.
    assert "/calibration/" not in err
    process = torchrun(tiny.model("llama"), texts, tmp_path / "out")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert content(tmp_path / "out") == expected
