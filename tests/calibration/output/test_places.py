"""Places are checked before the work."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from calibration.output.places import check_free_space, check_room, check_writable
from morphoquant_vllm.errors import MorphoQuantError


def test_free_space_is_checked_before_the_work(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1000)
    with pytest.raises(MorphoQuantError, match=r"needs 1000000.00 GB, but only"):
        check_free_space(tmp_path, 10**15)


def test_room_is_needed_for_the_checkpoint_and_the_work_together(tmp_path: Path) -> None:
    """Both are there when the checkpoint is written. Folders may be missing yet."""
    output, work = tmp_path / "new/out", tmp_path / "new/out.work"
    free = shutil.disk_usage(tmp_path).free
    check_room(output, work, 10**6, 10**6)
    for checkpoint, blocks in ((2 * free, 0), (0, 2 * free), (3 * free // 4, 3 * free // 4)):
        with pytest.raises(MorphoQuantError, match=r"out: calibration needs .* GB there, .* are free; .*--output"):
            check_room(output, work, checkpoint, blocks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_each_disk_needs_room_for_its_part(tmp_path: Path) -> None:
    work = Path("/dev/shm/no-such-work")
    with pytest.raises(MorphoQuantError, match=r"no-such-work: calibration needs .*--work"):
        check_room(tmp_path / "out", work, 0, 2 * shutil.disk_usage("/dev/shm").free)


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_noticed_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    for replaced in (False, True):
        with pytest.raises(MorphoQuantError, match=r"out: cannot be written \(.*\); choose another --work$"):
            check_writable(tmp_path / place, "--work", replaced=replaced)
        check_writable(tmp_path / "new" / "out", "--work", replaced=replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_is_kept_is_asked_itself_and_one_that_is_replaced_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """A container's /work, a user's folder below one of root's."""
    (tmp_path / "mine").mkdir()
    asked: list[Path] = []
    made = tempfile.TemporaryFile

    def watched(dir: Path) -> Any:
        asked.append(dir)
        return made(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    check_writable(tmp_path / "mine", "--work", replaced=replaced)
    assert asked == [tmp_path if replaced else tmp_path / "mine"]
