"""Who may write the cache, one build at a time, and what killed builds leave."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from morphoquant_vllm.cpu import cache


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(cache.logger, "warning", lambda text, *of: messages.append(text % of))
    return messages


def never() -> bool:
    return False


def soon() -> float:
    return time.monotonic() + 0.3


@pytest.mark.parametrize(("folder", "mode"), [("a/b/cache", 0o777), ("a/b/cache", 0o770), ("a/b", 0o777), ("a", 0o757)])
def test_a_folder_in_which_others_may_exchange_files_is_not_used(
    folder: str, mode: int, tmp_path: Path, warnings: list[str]
) -> None:
    """A parent counts: who may write it can put another folder there."""
    directory = tmp_path / "a/b/cache"
    directory.mkdir(parents=True)
    (tmp_path / folder).chmod(mode)
    with cache.usable_directory(directory) as used:
        assert used != directory and used.stat().st_mode & 0o777 == 0o700 and used.stat().st_uid == os.geteuid()
    assert not used.exists()
    assert len(warnings) == 1 and str(tmp_path / folder) in warnings[0] and "MORPHOQUANT_CACHE" in warnings[0]


def test_a_sticky_parent_such_as_tmp_is_safe(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    with cache.usable_directory(tmp_path / "tmp" / "cache") as used:
        assert used == tmp_path / "tmp" / "cache" and used.is_dir()
    assert warnings == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("folder", ["a/cache", "a"])
def test_a_folder_of_another_user_is_not_used(folder: str, tmp_path: Path, warnings: list[str]) -> None:
    directory = tmp_path / "a/cache"
    directory.mkdir(parents=True)
    os.chown(tmp_path / folder, 12345, 12345)
    with cache.usable_directory(directory) as used:
        assert used != directory
    assert len(warnings) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_library_of_another_user_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"library")
    cache.put(tmp_path / "made", tmp_path / "library.so")
    assert cache.is_intact(tmp_path / "library.so")
    os.chown(tmp_path / "library.so", 12345, 12345)
    assert not cache.is_intact(tmp_path / "library.so")


def test_a_link_is_followed_before_the_check(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with cache.usable_directory(tmp_path / "link") as used:
        assert used == tmp_path / "real"
    assert warnings == []


def test_a_folder_from_which_nothing_runs_is_not_used(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each library there would fail to load, and the slow reference would serve for ever."""
    flags = {tmp_path / "cache": os.ST_NOEXEC}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags.get(path, 0)))
    with cache.usable_directory(tmp_path / "cache") as used:
        assert used != tmp_path / "cache" and used.is_dir()
    (line,) = warnings
    assert "cache' is mounted with noexec" in line and "set MORPHOQUANT_CACHE" in line and "chmod" not in line


def test_a_name_that_is_too_long_is_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with cache.usable_directory(tmp_path / ("n" * 300)) as directory:
        assert not os.path.exists(directory)


def test_a_loop_of_links_is_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with cache.usable_directory(tmp_path / "loop" / "cache") as directory:
        assert not directory.exists()


def test_a_new_cache_and_its_parents_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with cache.usable_directory(tmp_path / "home/.cache/morphoquant") as used:
            assert used == tmp_path / "home/.cache/morphoquant"
    finally:
        os.umask(before)
    for path in (used, *used.parents[:2]):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_second_build_waits_for_the_first_and_not_for_ever(tmp_path: Path) -> None:
    with cache.one_build(tmp_path, never, soon()) as scratch:
        assert list(tmp_path.iterdir()) == [scratch]
        with pytest.raises(TimeoutError), cache.one_build(tmp_path, never, soon()):
            pass
        with cache.one_build(tmp_path, lambda: True, soon()):
            assert scratch.exists(), "the other one's folder is left alone"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_neither_lock_nor_folder(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from morphoquant_vllm.cpu import cache
with cache.one_build(Path(sys.argv[1]), lambda: False, time.monotonic() + 5) as scratch:
    (scratch / "half.o").write_text("")
    print("building", flush=True)
    time.sleep(60)
"""
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None and killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    (left,) = tmp_path.iterdir()
    with cache.one_build(tmp_path, never, soon()) as scratch:
        assert list(tmp_path.iterdir()) == [scratch] != [left]


def test_private_folders_of_killed_builds_are_removed_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new, other = (tmp_path / name for name in ("morphoquant-kernels-old", "morphoquant-kernels-new", "other"))
    for path in (old, new, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with cache.usable_directory(shared):
        pass
    assert not old.exists() and new.exists() and other.exists()


def test_a_folder_in_the_place_of_a_library_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "library.so" / "inside").mkdir(parents=True)
    (tmp_path / "made").write_bytes(b"library")
    assert not cache.is_intact(tmp_path / "library.so")
    cache.put(tmp_path / "made", tmp_path / "library.so")
    assert cache.is_intact(tmp_path / "library.so")
