import json
import os
from pathlib import Path

import pytest

from benchmarks.accuracy import cache
from benchmarks.accuracy.cache import Cache, code_digest, file_digest, write_atomically
from morphoquant_vllm.errors import MorphoQuantError

KEY = {"method": {"weights": "rtn", "group_size": 64}, "seed": 0, "windows": "abc"}


def test_a_result_comes_back_under_its_own_key_only(tmp_path: Path) -> None:
    store = Cache(tmp_path / "results")
    assert store.load(KEY) is None
    store.store(KEY, {"losses": [1.5]})
    assert store.load(dict(reversed(KEY.items()))) == {"losses": [1.5]}
    for changed in ({"seed": 1}, {"windows": "abd"}, {"method": {"weights": "rtn", "group_size": 32}}, {"new": None}):
        assert store.load({**KEY, **changed}) is None


def test_tuples_in_a_key_are_the_lists_that_json_makes_of_them(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.store({"a": (1, 2)}, {"x": 1})
    assert store.load({"a": (1, 2)}) == {"x": 1}


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.path(KEY).write_text('{"key": {}, "result": {}}')
    with pytest.raises(MorphoQuantError, match=r"damaged result .* delete it"):
        store.load(KEY)


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "replace", interrupted)
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


def test_stored_results_are_readable_json(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.store(KEY, {"x": 1})
    assert json.loads(store.path(KEY).read_text()) == {"key": KEY, "result": {"x": 1}}
