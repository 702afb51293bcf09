"""Digests of the code that decides a result."""

from pathlib import Path

import pytest

from benchmarks.accuracy.kept import code
from benchmarks.common import files


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (code.SIMULATION, "group_search.py"),
        (code.SIMULATION, "statistics.py"),
        (code.OBJECTIVE, "statistics.py"),
        (code.PARTS, "token_table.py"),
        (code.calibration_code(), "layers.py"),
        (code.SERVING, "gemm.h"),
        (code.SERVING, "tiles.json"),
    ],
)
def test_code_that_is_called_from_other_folders_counts(paths: tuple[Path, ...], name: str) -> None:
    found = {file.name for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    assert name in found and Path(name).suffix in files._SOURCES


def test_code_is_taken_once_as_it_was_imported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code.code_of((tmp_path,))
    (tmp_path / "a.py").write_text("x = 22\n")
    assert code.code_of((tmp_path,)) == first != files.code_digest([tmp_path])
