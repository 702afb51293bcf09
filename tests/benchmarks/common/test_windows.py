from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from benchmarks.common import texts, windows
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


def test_windows_are_spread_from_the_first_token_to_the_last() -> None:
    assert windows.spread(100, 10, 4, "x") == [0, 30, 60, 90]
    assert windows.spread(10, 10, 1, "x") == [0]
    with pytest.raises(MorphoQuantError, match=r"text 'x' has 39 tokens, 4 windows of 10 need 40"):
        windows.spread(39, 10, 4, "x")


def test_calibration_files_hold_as_many_windows_as_asked(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    counts = {"stdlib": 3, "licence": 1, "numpy": 0}
    own = {name: texts.CALIBRATION[name](tmp_path) for name in counts}
    files = windows.write_calibration(tokenizer, own, tmp_path / "data", 64, counts)
    assert [file.name for file in files] == ["stdlib.txt", "licence.txt"]
    for file, count in zip(files, (3, 1), strict=True):
        samples = build_samples(
            llama,
            load_conversations([file]),
            max_tokens=64,
            max_samples=None,
            placeholder_token_ids={},
            rows=DEFAULT_ROWS,
        )
        assert len(samples) == count


def test_evaluation_windows(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = texts.EVALUATION["code"](tmp_path)
    cut = windows.evaluation_windows(tokenizer, text, "code", 32, 5)
    assert [len(ids) for ids in cut] == [32] * 5
    assert tokenizer.decode(cut[0])[:2] == text[:2]


def test_each_window_begins_as_the_tokenizer_begins_texts(llama: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(llama)
    begun = AutoTokenizer.from_pretrained(llama)
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{plain.eos_token} $A", special_tokens=[(plain.eos_token, plain.eos_token_id)]
    )
    assert begun("")["input_ids"] == [plain.eos_token_id]
    text = texts.EVALUATION["code"](tmp_path)
    cut, whole = (windows.evaluation_windows(tokenizer, text, "code", 32, 3) for tokenizer in (begun, plain))
    assert [len(ids) for ids in cut] == [32] * 3
    assert {ids[0] for ids in cut} == {plain.eos_token_id}
    assert cut[0][1:] == whole[0][:-1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_excerpts_are_evenly_spaced(count: int) -> None:
    text = "".join(chr(0x4E00 + index) for index in range(1000))
    parts = windows.excerpts(text, count, 10).split("\n\n")
    starts = [text.index(part) for part in parts]
    assert [len(part) for part in parts] == [10] * count
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] == 990
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


def test_a_short_text_is_taken_whole() -> None:
    assert windows.excerpts("short", 3, 10) == "short"


class Letters:
    """A tokenizer: each letter is a token."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_each_text_gives_its_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Path] = []

    def read(corpus: Path, letter: str) -> str:
        seen.append(corpus)
        return letter * 100

    made = {letter: (lambda corpus, letter=letter: read(corpus, letter)) for letter in "abc"}
    monkeypatch.setattr(windows, "CALIBRATION", made)
    monkeypatch.setattr(windows, "CALIBRATION_WINDOWS", {"a": 2, "b": 1})
    monkeypatch.setattr(windows, "EVALUATION", {"c": made["c"]})
    assert windows.calibration_windows(Letters(), tmp_path, 5) == [[ord("a")] * 5] * 2 + [[ord("b")] * 5]
    assert windows.measuring_windows(Letters(), tmp_path, 4, 3) == {"c": [[ord("c")] * 4] * 3}
    assert seen == [tmp_path] * 3
