"""The commands from a user's view: a failure is one line on stderr, exit status 1, and leaves no file."""

import inspect as python_inspect
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from calibration import cli
from calibration.output.inspection import inspect_data
from calibration.settings.recipe import Recipe
from tests.calibration.built_models import TinyModels
from tests.checkpoints import write_random_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; exit status, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["morphoquant", *map(str, arguments)])
        try:
            cli.main()
            status: Any = 0
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
            logging.getLogger("calibration").setLevel(logging.NOTSET)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_calibrate_inspect_and_verify(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("group_size: 64\nmax_samples: 1\n")
    arguments = ["--data", tiny.data("llama"), "--output", tmp_path / "out", "--recipe", recipe, "--device", "cpu"]
    status, out, err = run("calibrate", tiny.model("llama"), *arguments, "--max-samples", 2)
    assert status == 0, err
    assert "14 layers quantized, escape rate" in out
    assert "block 2/2" in err
    settings = json.loads((tmp_path / "out" / "morphoquant_calibration.json").read_text())["settings"]
    assert (settings["group_size"], settings["max_samples"]) == (64, 2)
    status, out, err = run("verify", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "14 quantized layers" in out
    status, out, err = run("inspect", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "quantized layers: 14" in out
    status, out, err = run("inspect", tmp_path / "out", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == inspect_data(tmp_path / "out")


FLAGS = {
    "targets": "--target",
    "ignore": "--ignore",
    "towers": "--tower",
    "full_mask": "--full-mask",
    "massive_row": "--massive-row --no-massive-row",
    "modality_rows": "--modality-rows --no-modality-rows",
    "regression": "--regression --no-regression",
    "group_size": "--group-size",
    "shard_size": "--shard-size",
    "tau": "--tau",
}


def options() -> dict[str, Any]:
    command = typer.main.get_command(cli.app).commands["calibrate"]  # type: ignore[attr-defined]
    return {option.name: option for option in command.params}


def test_flags_are_spelt_as_they_always_were() -> None:
    found = options()
    assert {name: " ".join((*found[name].opts, *found[name].secondary_opts)) for name in FLAGS} == FLAGS


def test_every_setting_has_a_flag_that_states_its_default() -> None:
    flags = options()
    for name, field in Recipe.model_fields.items():
        assert flags[name].default is None  # the recipe's default holds
        assert field.description in flags[name].help
        if isinstance(field.default, bool):
            assert f"(default: {'yes' if field.default else 'no'})" in flags[name].help, name
        elif isinstance(field.default, str | int | float):
            spellings = {str(field.default), f"{field.default:g}" if isinstance(field.default, float) else "4GB"}
            # An empty text is written as none.
            spellings = spellings if field.default != "" else {"none"}
            assert spellings & set(re.findall(r"[\w.]*\w", flags[name].help)), name


def test_the_command_line_is_read_before_torch_is_imported() -> None:
    """Its threads read OMP_WAIT_POLICY once, and `main` sets it; and --help need not wait for it."""
    code = "import sys, calibration.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def refused(result: tuple[int, str, str], expected: str) -> None:
    status, out, err = result
    assert status == 1, err
    assert re.search(expected, err), err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--target", "*.nothing"], "'\\*.nothing' matches no layer"),
        (["--target", "*.q_proj"], "qkv_proj: its shards"),
        (["--target", "lm_head"], "matches no layer"),  # tied: the file has none
        (["--target", "model.embed_tokens"], "embed_tokens is outside the language model's decoder"),
        (["--group-size", "48"], "group_size = 48 is not allowed"),
        (["--tensor-parallel", "3"], "tensor parallel size 3 breaks a group"),
        (["--tau", "-1"], "tau = -1.0 is not allowed"),
        (["--device", "toaster"], "device = 'toaster'"),
        (["--recipe", "none.yaml"], "none.yaml: the recipe cannot be read"),
        (["--data", "none.jsonl"], "none.jsonl: no such calibration data"),
        (["--data", "empty.jsonl"], "empty.jsonl: no conversations"),
        (["--data", "broken.jsonl"], "broken.jsonl:1: not JSON"),
        (["--data", "part.jsonl"], "part.jsonl:1: unknown part type 'smell'"),
        (["--data", "image.jsonl"], "image.jsonl:1: the model does not take image parts"),
        (["--output", "model"], "overlap"),
        (["--output", "file/out"], "cannot be written"),
        (["--output", "full"], "full: exists and is not empty"),
    ],
)
def test_bad_calls(
    tiny: TinyModels, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.model("llama"), "model")
    Path("empty.jsonl").write_text("\n")
    Path("broken.jsonl").write_text("{\n")
    content = {"smell": {"type": "smell"}, "image": {"type": "image_url", "image_url": {"url": "file"}}}
    for name, part in (("part", content["smell"]), ("image", content["image"])):
        Path(f"{name}.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": [part]}]}) + "\n")
    Path("file").write_text("x")
    Path("full").mkdir()
    Path("full/old").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    if "--data" not in flags:
        flags = [*flags, "--data", str(tiny.data("llama"))]
    if "--output" not in flags:
        flags = [*flags, "--output", "out"]
    refused(run("calibrate", "model", *flags), expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_models(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    def attempt(model: Path, expected: str) -> None:
        refused(run("calibrate", model, "--data", tiny.data("llama"), "--output", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()

    attempt(tmp_path / "none", "none: no such model directory")
    model = tmp_path / "model"
    shutil.copytree(tiny.model("llama"), model)
    config = json.loads((model / "config.json").read_text())
    changes = {"model_type": "other", "architectures": ["OtherForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config | changes))
    attempt(model, "model_type 'other' is not supported: transformers")
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    attempt(model, "only safetensors")
    (model / "pytorch_model.bin").unlink()
    attempt(model, "no weights")
    (model / "config.json").unlink()
    attempt(model, "no config.json")


def test_bad_checkpoints_for_inspect_and_verify(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    for command in ("inspect", "verify"):
        refused(run(command, tmp_path / "none"), "none")
        refused(run(command, tiny.model("llama")), "plain model")


def test_odd_places_end_in_one_line(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for command in ("inspect", "verify", "report"):
        for place in (tmp_path / "loop", tmp_path / "file", tmp_path / ("x" * 300), "a\n\x1b[31mb\udcff"):
            refused(run(command, place), "config.json|too long")


def test_a_terminal_that_does_not_know_a_letter_shows_its_number(tmp_path: Path) -> None:
    directory = tmp_path / "[red]\u00e9\n\x1b"
    write_random_checkpoint(directory)
    for command in ("verify", "inspect", "inspect --json"):
        done = subprocess.run(
            [sys.executable, "-m", "calibration", *command.split(), str(directory)],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\x1b" not in done.stdout


def test_convert(tmp_path: Path, run: Run) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_random_checkpoint(old, layers=1)
    refused(run("convert", old, "--output", new), f"{old}: has format_version 3 already, so there is nothing to do")
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]["integrity"]
    config["quantization_config"]["format_version"] = 2
    (old / "config.json").write_text(json.dumps(config))
    assert "`morphoquant convert` makes version 3 of it" in run("verify", old)[1]
    status, out, err = run("convert", old, "--output", new)
    assert (status, out, err) == (0, f"{new}: format_version 3, 7 quantized layers\n", "")
    assert run("verify", new) == (0, f"{new}: 7 quantized layers, all in order\n", "")
    refused(run("convert", old, "--output", new), "pass --overwrite")
    flags = ["--scales", "two-level", "--overwrite"]
    status, out, err = run("convert", old, "--output", new, *flags)
    assert (status, out) == (0, f"{new}: format_version 3, 7 quantized layers, 7 left with group scales\n"), err
    status, out, err = run("convert", old, "--output", new, *flags, "--approximate")
    assert status == 0 and "7 refitted to two-level scales (relative weight error " in out, err


def test_missing_data_is_a_usage_error(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    status, _, err = run("calibrate", tiny.model("llama"), "--output", tmp_path / "out")
    assert status == 2
    assert "--data" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_only_its_work(
    tiny: TinyModels, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    from calibration.progress import BlockProgress

    monkeypatch.setattr(BlockProgress, "__call__", lambda self, result: os.kill(os.getpid(), number))
    # A shell starts background jobs with SIGINT ignored, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, _ = run(
            "calibrate",
            tiny.model("llama"),
            "--data",
            tiny.data("llama"),
            "--output",
            tmp_path / "out",
            "--device",
            "cpu",
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == status
    assert list(tmp_path.iterdir()) == [tmp_path / "out.work"]


@pytest.mark.parametrize(
    ("largest", "place", "left"),
    [
        (300_000, "out", ["out.work"]),
        pytest.param(100_000, "out.work", ["out.work"], marks=pytest.mark.full),
        (10_000, "out.work", []),
    ],
)
def test_a_disk_that_takes_no_more_costs_nothing_that_is_finished(
    tiny: TinyModels, tmp_path: Path, largest: int, place: str, left: list[str]
) -> None:
    """A real write that fails in the middle: the system refuses to let a file grow past a limit.

    First the checkpoint's, then a block's, then the first sample's.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    command = [sys.executable, "-m", "calibration", "calibrate", tiny.model("llama"), "--device", "cpu"]
    result = subprocess.run(
        [*map(str, command), "--data", str(tiny.data("llama")), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit,
        cwd=Path(python_inspect.getfile(cli)).parents[1],
    )
    refused((result.returncode, result.stdout, result.stderr), rf"{place}: cannot be written \(.*File too large")
    assert [path.name for path in tmp_path.iterdir()] == left
    assert not list(tmp_path.rglob("*.partial*"))


def test_doctor_has_an_exit_status(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slow checks start other processes; they have tests of their own."""
    from morphoquant_vllm.doctor import server
    from morphoquant_vllm.doctor.finding import problem

    monkeypatch.setattr(server, "interfaces", lambda mendable: [])
    monkeypatch.setattr(server, "needed_mends", list)
    monkeypatch.setattr(server, "media", lambda needed, mendable: [])
    write_random_checkpoint(tmp_path / "model")
    status, out, err = run("doctor", "--model", tmp_path / "model")
    assert (status, err) == (0, ""), out
    assert "this machine can serve" in out and " memory " in out
    monkeypatch.setattr(server, "interfaces", lambda mendable: [problem("interfaces", "differ", "install it")])
    status, out, _ = run("doctor", "--json")
    assert (status, json.loads(out)["healthy"]) == (1, False)
    refused(run("doctor", "--model", tmp_path / "none"), "none")


def test_doctor_mends_before_it_looks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from morphoquant_vllm.doctor import mends, server
    from morphoquant_vllm.errors import MorphoQuantError

    faults = ["torchaudio"]
    mend = mends.Mend("torchaudio", "it is old", "makes it young", faults.clear)
    monkeypatch.setattr(mends, "needed_mends", lambda: [mend] if faults else [])
    monkeypatch.setattr(server, "interfaces", lambda mendable: [])
    monkeypatch.setattr(server, "media", lambda needed, mendable: [])
    status, out, _ = run("doctor")
    assert status == 1 and "PROBLEM  torchaudio" in out and "--mend makes it young" in out
    status, out, err = run("doctor", "--mend")
    assert (status, err) == (0, "mending torchaudio: it is old; the mend makes it young\n")
    assert "torchaudio" not in out

    def refuse() -> None:
        raise MorphoQuantError("torchaudio stays old; buy another")

    faults.append("torchaudio")
    monkeypatch.setattr(mends, "needed_mends", lambda: [mends.Mend("torchaudio", "", "", refuse)])
    status, _, err = run("doctor", "--mend")
    assert status == 1 and err.endswith("error: torchaudio stays old; buy another\n")


def test_compare_prints_and_writes_a_page(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    """The source with itself, on two samples; a figure differs nowhere."""
    model, data, page = tiny.model("llama"), tiny.data("llama"), tmp_path / "page.html"
    status, out, err = run("compare", model, model, "--data", data, "--max-samples", 2, "--output", page)
    assert status == 0, err
    assert "100.0%" in out and "0.00000" in out and "100.0%" in page.read_text()
    refused(run("compare", model, model, "--data", data, "--output", page), "page.html: exists")
    status, out, _ = run("compare", model, model, "--data", data, "--max-samples", 2, "--json")
    assert json.loads(out)["modalities"]["all"]["divergence"] == 0


def test_a_dry_run_writes_nothing_and_refuses_as_a_run(tiny: TinyModels, tmp_path: Path, run: Run) -> None:
    model, output = tiny.model("llama"), tmp_path / "out"
    arguments = ["--output", output, "--device", "cpu", "--dry-run"]
    status, out, err = run("calibrate", model, "--data", tiny.data("llama"), *arguments)
    assert status == 0, err
    assert "14 linears in 2 blocks" in out and "disk: " in out and "memory: up to " in out
    assert list(tmp_path.iterdir()) == []
    refused(run("calibrate", model, "--data", tmp_path / "none.jsonl", *arguments), "none.jsonl")
    output.mkdir()
    (output / "file").write_text("")
    refused(run("calibrate", model, "--data", tiny.data("llama"), *arguments), "exists and is not empty")
