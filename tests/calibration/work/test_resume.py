"""An interrupted calibration resumes to the same bytes, or names the reason why it cannot."""

import json
import logging
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.blocks.loop import BlockResult
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from calibration.work.lock import locked
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels
from tests.calibration.killing import content, in_child

RECIPE = Recipe(device="cpu", sample_tokens=64, max_samples=2)


class Stopped(Exception):
    """Ends a run after a block."""


def stop(result: BlockResult) -> None:
    raise Stopped


class Case:
    """A tiny model with its data, and the checkpoint that an uninterrupted run makes of it."""

    def __init__(self, directory: Path, tiny: TinyModels) -> None:
        self.model = shutil.copytree(tiny.model("llama"), directory / "model")
        self.data = shutil.copytree(tiny.data("llama").parent, directory / "data") / "data.jsonl"
        calibrate(self.model, self.data, directory / "out", recipe=RECIPE)
        assert not (directory / "out.work").exists()
        self.expected = content(directory / "out")

    def run(self, output: Path, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Any]:
        return calibrate(self.model, self.data, output, recipe=recipe, **options)

    def begin(self, output: Path, recipe: Recipe = RECIPE, **options: Any) -> dict[str, bytes]:
        """A run that is stopped after its first block; the content of its work directory."""
        with pytest.raises(Stopped):
            self.run(output, recipe, on_block=stop, **options)
        return content(output.with_name(f"{output.name}.work"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModels) -> Case:
    return Case(tmp_path_factory.mktemp("resume"), tiny)


def finish(case: Case, output: Path) -> None:
    """The same call again, unless all that was left was to remove an empty work directory."""
    try:
        case.run(output)
    except MorphoQuantError as error:
        assert "out: exists and is not empty" in str(error)
    assert content(output) == case.expected
    assert [path.name for path in output.parent.iterdir()] == [output.name]


# Of about 60 steps: among the samples, in the first block, in the second, and while the checkpoint takes its place.
@pytest.mark.parametrize("step", [3, 14, 27, 38, 49])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(case: Case, tmp_path: Path, step: int) -> None:
    assert not in_child(partial(case.run, tmp_path / "out"), at_step=step)
    finish(case, tmp_path / "out")


@pytest.mark.full
def test_a_run_killed_before_each_of_its_steps_goes_on_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    step, ended = 0, False
    while not ended:
        output = tmp_path / str(step) / "out"
        output.parent.mkdir()
        ended = in_child(partial(case.run, output), at_step=step)
        if not ended or step == 0:
            finish(case, output)
        step += 1
    assert step > 50


@pytest.mark.full
def test_fifty_kills_at_random_moments_change_no_byte(case: Case, tmp_path: Path) -> None:
    moments, kills, finished = random.Random(7), 0, 0
    output = tmp_path / "out"
    while kills < 50:
        if in_child(partial(case.run, output), after=moments.uniform(0.05, 1.5)):
            assert content(output) == case.expected
            assert not output.with_name("out.work").exists()
            shutil.rmtree(output)
            finished += 1
        else:
            kills += 1
    case.run(output)
    assert content(output) == case.expected
    assert list(tmp_path.iterdir()) == [output]


def test_rendered_samples_of_a_killed_run_do_not_stay(case: Case, tmp_path: Path) -> None:
    """Killed between the samples' manifest and the removal of what they were rendered to."""
    case.begin(tmp_path / "out")
    (tmp_path / "out.work" / "rendered-00000.safetensors").write_bytes(b"pixels")

    def gone(result: BlockResult) -> None:
        assert not list((tmp_path / "out.work").glob("rendered-*"))

    case.run(tmp_path / "out", on_block=gone)
    assert content(tmp_path / "out") == case.expected


def test_finished_blocks_are_not_computed_again(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case.begin(tmp_path / "out")
    blocks: list[int] = []
    with caplog.at_level(logging.INFO, logger="calibration"):
        case.run(tmp_path / "out", on_block=lambda result: blocks.append(result.index))
    assert blocks == [1]
    assert "resuming after 1 of 2 blocks" in caplog.text
    assert content(tmp_path / "out") == case.expected


def refused(case: Case, output: Path, expected: str, recipe: Recipe = RECIPE, **options: Any) -> None:
    """The call is refused in one line, and costs nothing."""
    work = output.with_name("out.work")
    before = content(work)
    with pytest.raises(MorphoQuantError, match=expected) as caught:
        case.run(output, recipe, **options)
    assert "\n" not in str(caught.value)
    assert content(work) == before
    assert not output.exists()


def test_other_settings_are_refused_and_named(case: Case, tmp_path: Path) -> None:
    case.begin(tmp_path / "out")
    changed = RECIPE.model_copy(update={"seed": 5, "group_size": 64})
    refused(case, tmp_path / "out", r"group_size was 32, now 64; seed was 0, now 5\).*--restart.*1 finished", changed)
    refused(case, tmp_path / "out", "skip_bad was false, now true", skip_bad=True)
    finish(case, tmp_path / "out")


def test_with_restart_other_settings_begin_anew(case: Case, tmp_path: Path) -> None:
    other = RECIPE.model_copy(update={"escape_budget": 0.0})
    case.begin(tmp_path / "out", other)
    assert content(tmp_path / "out.work") != {}
    case.run(tmp_path / "out", restart=True)
    assert content(tmp_path / "out") == case.expected


def test_other_data_and_another_model_are_refused_and_named(case: Case, tmp_path: Path) -> None:
    case.begin(tmp_path / "out")
    lines = case.data.read_text().splitlines(keepends=True)
    other = json.loads(lines[1])
    other["messages"].append({"role": "user", "content": "And then?"})
    try:
        case.data.write_text("".join([lines[0], json.dumps(other) + "\n", *lines[2:]]))
        refused(case, tmp_path / "out", r"data.jsonl:2 or its media have changed")
        case.data.write_text("".join(lines[:-1]))
        refused(case, tmp_path / "out", rf"the data were {len(lines)} conversations and texts, now {len(lines) - 1}")
        case.data.write_text("".join(lines))
        weights = case.model / "model.safetensors"
        good, state = weights.read_bytes(), weights.stat()
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        # As `cp -p` and rsync leave it: neither size nor time tells.
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
        refused(case, tmp_path / "out", r"model.safetensors has changed")
    finally:
        case.data.write_text("".join(lines))
        weights.write_bytes(good)
    finish(case, tmp_path / "out")


def test_files_that_changed_or_went_are_named_and_cost_nothing(case: Case, tmp_path: Path) -> None:
    case.begin(tmp_path / "out")
    names = [
        *("run.json", "samples.json", "sample-00001.safetensors", "block-00000.json", "block-00000.safetensors"),
        *("hidden-00001.safetensors", "served-00001.safetensors"),
    ]
    for name in names:
        path = tmp_path / "out.work" / name
        good = path.read_bytes()
        middle = len(good) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        refused(case, tmp_path / "out", rf"{re.escape(name)}: cannot be used .*--restart")
        path.write_bytes(good[:middle])
        refused(case, tmp_path / "out", rf"{re.escape(name)}: cannot be used .*--restart")
        path.unlink()
        # Without block-00000.json nothing tells of a finished block; without run.json nothing tells whose all this is.
        if name not in ("run.json", "block-00000.json"):
            refused(case, tmp_path / "out", rf"{re.escape(name)}: cannot be used .*--restart")
        path.write_bytes(good)
    finish(case, tmp_path / "out")


def test_a_file_that_goes_during_the_run_is_one_line(case: Case, tmp_path: Path) -> None:
    def lose(result: BlockResult) -> None:
        (tmp_path / "out.work" / "block-00000.safetensors").unlink(missing_ok=True)

    with pytest.raises(MorphoQuantError, match=r"block-00000.safetensors: cannot be used \(.*--restart"):
        case.run(tmp_path / "out", on_block=lose)
    assert (tmp_path / "out.work" / "block-00001.safetensors").exists()
    assert not (tmp_path / "out").exists()


def test_a_second_run_is_refused_while_the_first_lives(case: Case, tmp_path: Path) -> None:
    case.begin(tmp_path / "out")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path / "out.work"):
            os.write(write, b"x")
            signal.pause()
    assert os.read(read, 1) == b"x"
    refused(case, tmp_path / "out", r"out\.work: another calibration uses this work directory")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finish(case, tmp_path / "out")


def test_the_recorded_threads_compute_the_rest(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    try:
        case.run(tmp_path / "whole")
        case.begin(tmp_path / "out")
        torch.set_num_threads(1)
        used: list[int] = []
        with caplog.at_level(logging.INFO, logger="calibration"):
            case.run(tmp_path / "out", on_block=lambda result: used.append(torch.get_num_threads()))
        assert used == [2]
        assert torch.get_num_threads() == 1
        assert "computing on 2 threads" in caplog.text
    finally:
        torch.set_num_threads(1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_only_the_removal_of_the_work_was_left(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr("calibration.calibrate.clear_work", interrupted)
        case.run(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]
    report = case.run(tmp_path / "out")
    assert len(report["layers"]) == 14
    assert content(tmp_path / "out") == case.expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_work_directory_is_never_somebody_elses(case: Case, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(MorphoQuantError, match=r"mine: holds thesis.tex and is not a calibration's work directory"):
        case.run(tmp_path / "out", work=tmp_path / "mine", restart=True)
    # Names that a calibration uses, too.
    (tmp_path / "theirs").mkdir()
    for name in ("metrics-1.safetensors", "samples.json", "run.json"):
        (tmp_path / "theirs" / name).write_text('{"my": "experiment"}')
        for restart in (False, True):
            with pytest.raises(MorphoQuantError, match=r"theirs: holds \S+ and is not a calibration's work directory"):
                case.run(tmp_path / "out", work=tmp_path / "theirs", restart=restart)
    assert len(list((tmp_path / "theirs").iterdir())) == 3
    shutil.rmtree(tmp_path / "theirs")
    for work in (case.model / "work", tmp_path / "out" / "work", tmp_path):
        with pytest.raises(MorphoQuantError, match=r"overlap; choose another --work"):
            case.run(tmp_path / "out", work=work)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["mine", "mine/thesis.tex"]

    # A given work directory is used, and foreign files in it stay.
    def add(result: BlockResult) -> None:
        (tmp_path / "given" / "note").write_text("mine")

    case.run(tmp_path / "out", work=tmp_path / "given", on_block=add)
    assert content(tmp_path / "out") == case.expected
    assert content(tmp_path / "given") == {"note": b"mine"}
