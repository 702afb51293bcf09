"""What a result says of its machine and code."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.common import machine


def git(folder: Path, *words: str) -> None:
    names = ("-c", "user.name=x", "-c", "user.email=x@y")
    subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True)


def test_the_commit_and_whether_files_have_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As benchmarks/common/machine.py lies in the repository.
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    assert machine.commit() == ""
    git(tmp_path, "init")
    (tmp_path / "code").write_text("1")
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-m", "first")
    first = machine.commit()
    assert first and not first.endswith("+")
    (tmp_path / "code").write_text("2")
    assert machine.commit() == first + "+"
