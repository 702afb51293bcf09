import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from calibration.calibrate import default_work
from calibration.output.places import check_name, check_output
from calibration.output.staging import explain_write_errors, only_run, staged_directory
from morphoquant_vllm.errors import MorphoQuantError


def config(number: str) -> str:
    """A config.json of our format."""
    return json.dumps({"quantization_config": {"quant_method": "morphoquant"}, "number": number})


def number(output: Path) -> str:
    found: str = json.loads((output / "config.json").read_text())["number"]
    return found


def write(output: Path, content: str, overwrite: bool = False, model: Path | None = None) -> None:
    with staged_directory(output, model or output.parent / "model", overwrite=overwrite, tag="t") as directory:
        (directory / "config.json").write_text(config(content))


def test_the_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged_directory(output, tmp_path / "model", overwrite=False, tag="t") as directory:
        (directory / "config.json").write_text(config("1"))
        assert not output.exists()
        assert directory.parent == output.parent
    assert number(output) == "1"
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        staged_directory(tmp_path / "out", tmp_path / "model", overwrite=False, tag="t") as directory,
    ):
        (directory / "half").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_tidied_away_by_the_next_of_its_tag(tmp_path: Path) -> None:
    output, model = tmp_path / "out", tmp_path / "model"
    for name in ("out.partial-t", "out.partial-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    # Killed between the two renames of a replacement: the older checkpoint goes back to its place first.
    (tmp_path / "out.old-t").mkdir()
    (tmp_path / "out.old-t" / "config.json").write_text(config("1"))
    with (
        pytest.raises(MorphoQuantError, match="exists and is not empty"),
        staged_directory(output, model, overwrite=False, tag="t"),
    ):
        pass
    assert number(output) == "1"
    with staged_directory(output, model, overwrite=True, tag="t") as directory:
        assert list(directory.iterdir()) == []
        (directory / "config.json").write_text(config("2"))
    assert number(output) == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial-other"]


def test_an_empty_directory_may_be_filled_but_a_checkpoint_only_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    write(output, "1")
    with pytest.raises(MorphoQuantError, match=r"out: exists and is not empty; .*--overwrite"):
        write(output, "2")
    assert number(output) == "1"
    with pytest.raises(RuntimeError), staged_directory(output, tmp_path / "model", overwrite=True, tag="t"):
        raise RuntimeError
    assert number(output) == "1"
    write(output, "2", overwrite=True)
    assert number(output) == "2"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_during_the_run_survives(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "out"
    expected = "out: is not a checkpoint" if overwrite else r"out: exists and is not empty; .*--overwrite"
    with (
        pytest.raises(MorphoQuantError, match=expected),
        staged_directory(output, tmp_path / "model", overwrite=overwrite, tag="t") as directory,
    ):
        (directory / "config.json").write_text(config("1"))
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "thesis.tex"]


def test_even_the_last_rename_does_not_replace_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with (
        pytest.raises(MorphoQuantError, match=r"out: cannot be written \(.*not empty"),
        staged_directory(output, tmp_path / "model", overwrite=False, tag="t"),
    ):
        # As if the files came between the check and the rename.
        monkeypatch.setattr("calibration.output.staging.check_output", lambda *arguments, **options: None)
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "thesis.tex"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mount")
    for name in ("mount", "link"):
        with pytest.raises(MorphoQuantError, match=f"{name}: is a mount point.*choose a directory below it"):
            write(tmp_path / name, "1")
    write(tmp_path / "mount" / "out", "1")
    assert number(tmp_path / "mount" / "out") == "1"


def test_the_working_directory_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged_directory(Path("."), tmp_path / "model", overwrite=False, tag="t") as directory:
        (directory / "config.json").write_text(config("1"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["here", "here/config.json"]


def test_overwrite_does_not_delete_what_is_no_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(MorphoQuantError, match="is not a checkpoint"):
        write(output, "1", overwrite=True)
    assert (output / "thesis.tex").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"name": "my app"}', '{"quantization_config": {"quant_method": "gptq"}}', "[" * 100_000],
)
def test_overwrite_does_not_delete_another_config(tmp_path: Path, content: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text(content)
    with pytest.raises(MorphoQuantError, match="is not a checkpoint"):
        write(output, "1", overwrite=True)
    assert (output / "config.json").read_text() == content


def test_a_fifo_in_the_place_of_config_json_does_not_hang(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    os.mkfifo(output / "config.json")
    with pytest.raises(MorphoQuantError, match="is not a checkpoint"):
        write(output, "1", overwrite=True)


@pytest.mark.parametrize("name", ["thesis.tex", ".git/HEAD", "results/scores.json"])
def test_overwrite_does_not_delete_files_beside_a_checkpoint(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    write(output, "1")
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("years of work")
    with pytest.raises(MorphoQuantError, match=f"{name}: does not belong to a checkpoint, so out is not overwritten"):
        write(output, "2", overwrite=True)
    assert number(output) == "1" and (output / name).read_text() == "years of work"


def test_overwrite_does_not_mind_what_hubs_and_systems_leave(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write(output, "1")
    for name in (".gitattributes", ".DS_Store", ".cache/huggingface/x.lock", "__pycache__/x.pyc"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    write(output, "2", overwrite=True)
    assert number(output) == "2" and [path.name for path in output.iterdir()] == ["config.json"]


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    with only_run(tmp_path / "out"):
        with pytest.raises(MorphoQuantError, match="out: another conversion writes it"), only_run(tmp_path / "out"):
            pass
        with only_run(tmp_path / "other"):
            pass
        (tmp_path / "out.lock").write_text("of another tool")
    with only_run(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.lock"]


def test_the_model_is_never_the_output(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("source")
    for output in (model, tmp_path, model / "quantized"):
        with pytest.raises(MorphoQuantError, match="overlap"):
            write(output, "1", overwrite=True, model=model)
    assert list(model.iterdir()) == [model / "config.json"]


def test_an_output_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MorphoQuantError, match="file: exists and is not a directory"):
        write(tmp_path / "file", "1")
    with pytest.raises(MorphoQuantError, match=r"file/out: cannot be written \(.*"):
        write(tmp_path / "file" / "out", "1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(MorphoQuantError, match=r"locked/out: cannot be written \(.*Permission denied"):
        write(tmp_path / "locked" / "out", "1")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
        # The exact message of safetensors 0.8 on a full tmpfs.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    expected = r"out: cannot be written \(.*No space left on device\)"
    with pytest.raises(MorphoQuantError, match=expected) as caught, explain_write_errors(tmp_path / "out"):
        raise error
    assert "\n" not in str(caught.value)


def test_a_source_file_that_cannot_be_read_is_no_write_error(tmp_path: Path) -> None:
    source = str(tmp_path / "model" / "merges.txt")
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)
    expected = r"model/merges.txt: cannot be read \(Permission denied\)"
    with pytest.raises(MorphoQuantError, match=expected), explain_write_errors(tmp_path / "out", tmp_path / "model"):
        raise denied
    # As shutil.copyfile reports a full disk: with the names of both files.
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, str(tmp_path / "out" / "merges.txt"))
    expected = r"out: cannot be written \(.*No space left on device\)"
    with pytest.raises(MorphoQuantError, match=expected), explain_write_errors(tmp_path / "out", tmp_path / "model"):
        raise full


@pytest.mark.parametrize("name", ["n" * 245, "é" * 120, "n" * 300, "deep/" + "n" * 245, "n" * 300 + "/out"])
def test_a_name_that_leaves_no_room_for_a_temporary_one_is_refused(name: str, tmp_path: Path) -> None:
    """245 letters alone would fit, but ".partial-..." would not after hours of work; a letter may take two bytes."""
    with pytest.raises(MorphoQuantError, match=r"the name is too long; choose one of at most 2\d\d bytes"):
        check_name(tmp_path / name)
    with pytest.raises(MorphoQuantError, match="the name is too long"):
        write(tmp_path / name, "1")
    assert list(tmp_path.iterdir()) == []


def test_the_root_and_a_path_that_is_not_utf8_are_refused(tmp_path: Path) -> None:
    for path, problem in (
        (Path("/"), "is the root of all files"),
        (tmp_path / "pos\udce9" / "out", "the path is not UTF-8"),
    ):
        with pytest.raises(MorphoQuantError, match=problem):
            check_name(path)
        assert default_work(path).name == f"{path.name}.work"


def test_a_link_is_not_overwritten_and_its_place_is_named(tmp_path: Path) -> None:
    write(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(MorphoQuantError, match=f"link: is a link, .*; give {tmp_path / 'real'} as --output"):
        check_output(tmp_path / "link", tmp_path / "model", overwrite=True)


def test_the_longest_name_that_is_allowed_works(tmp_path: Path) -> None:
    output = tmp_path / ("n" * 238)
    check_name(output)
    write(output, "1")
    assert number(output) == "1"
