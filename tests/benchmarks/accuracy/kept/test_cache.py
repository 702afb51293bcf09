import json
from pathlib import Path

import pytest

from benchmarks.accuracy.kept.cache import Cache
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


def test_stored_results_are_readable_json(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.store(KEY, {"x": 1})
    stored = json.loads(store.path(KEY).read_text())
    assert (stored["key"], stored["result"]) == (KEY, {"x": 1})


def test_a_result_says_which_machine_and_commit_made_it(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.store(KEY, {"loss": 1.0})
    made = store.made(KEY)
    assert made["machine"] and set(made) == {"machine", "commit"}
    # Results of before do not say.
    path = store.path(KEY)
    stored = json.loads(path.read_text())
    del stored["made"]
    path.write_text(json.dumps(stored))
    assert store.made(KEY) == {} and store.load(KEY) == {"loss": 1.0}
