import json
import os
from pathlib import Path

import pytest

from benchmarks.common import files
from benchmarks.common.files import code_digest, file_digest, read_result, write_atomically, write_results
from morphoquant_vllm.errors import MorphoQuantError


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_digest_sees_names_contents_and_changes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = file_digest([tmp_path])
    (tmp_path / "a").write_text("2")
    os.utime(tmp_path / "a", ns=(1, 1))
    second = file_digest([tmp_path])
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, file_digest([tmp_path])}) == 3


def test_code_digest_ignores_words_but_not_code(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text('"""Old."""\n\n\ndef f(x):\n    """Words."""\n    return x + 1\n')
    first = code_digest([tmp_path])
    source.write_text("def f(x):\n    # other words\n    return x + 1\n")
    assert code_digest([tmp_path]) == first
    source.write_text("def f(x):\n    return x + 2\n")
    assert code_digest([tmp_path]) != first


def test_a_result_is_json_and_a_summary_and_its_plot_if_there_is_one(tmp_path: Path) -> None:
    assert [path.name for path in write_results(tmp_path / "new", "a", {"x": 1}, "# A\n")] == ["a.json", "a.md"]
    paths = write_results(tmp_path, "b", {"x": 2}, "# B\n", b"picture")
    assert [path.read_bytes() for path in paths[1:]] == [b"# B\n", b"picture"]
    assert json.loads(paths[0].read_text()) == read_result(tmp_path, "b") == {"x": 2}


def test_a_result_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match=r"none\.json: no such result; measure first"):
        read_result(tmp_path, "none")
    (tmp_path / "half.json").write_text('{"x"')
    with pytest.raises(MorphoQuantError, match=r"half\.json: not JSON .* run the benchmark again"):
        read_result(tmp_path, "half")


@pytest.mark.parametrize("name", ["kernel.cpp", "kernel.h", "tiles.json"])
def test_code_digest_sees_other_sources_by_their_content(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.md").write_text("1")
    first = code_digest([tmp_path])
    (tmp_path / name).write_text("1")
    second = code_digest([tmp_path])
    (tmp_path / name).write_text("22")
    assert len({first, second, code_digest([tmp_path])}) == 3
    (tmp_path / "notes.md").write_text("22")
    assert code_digest([tmp_path]) not in {first, second}
