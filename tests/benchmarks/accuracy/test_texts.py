from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.accuracy import corpus, texts
from benchmarks.accuracy.settings import CALIBRATION_WINDOWS, parse_calibration
from calibration.data.conversations import load_conversations
from calibration.data.rendering import build_samples
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


def test_windows_are_spread_from_the_first_token_to_the_last() -> None:
    assert texts.spread(100, 10, 4, "x") == [0, 30, 60, 90]
    assert texts.spread(10, 10, 1, "x") == [0]
    with pytest.raises(MorphoQuantError, match=r"text 'x' has 39 tokens, 4 windows of 10 need 40"):
        texts.spread(39, 10, 4, "x")


def test_no_text_is_both_calibrated_and_evaluated_on() -> None:
    assert not set(texts.EVALUATION_MODULES) & set(texts.CALIBRATION_MODULES)
    assert set(CALIBRATION_WINDOWS) == set(texts.CALIBRATION)
    assert sum(CALIBRATION_WINDOWS.values()) == 32


def test_calibration_files_hold_as_many_windows_as_asked(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    counts = {"stdlib": 3, "licence": 1, "numpy": 0}
    files = texts.write_calibration(tokenizer, tmp_path, tmp_path / "data", 64, counts)
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
    windows = texts.evaluation_windows(tokenizer, tmp_path, "code", 32, 5)
    assert [len(ids) for ids in windows] == [32] * 5
    assert tokenizer.decode(windows[0])[:2] == texts.EVALUATION["code"](tmp_path)[:2]


def test_a_missing_corpus_is_one_line_with_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "REQUIREMENT", "./no-such-file.tar.gz")
    with pytest.raises(MorphoQuantError, match=r"pip cannot download \./no-such-file\.tar\.gz \(.+\); connect to"):
        corpus.fetch(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope=1", "unknown calibration domain 'nope'"),
        ("numpy", "not domain=windows"),
        ("numpy=0", "no window is left"),
    ],
)
def test_calibration_setting(given: str, message: str) -> None:
    assert parse_calibration("numpy=2,report=3") == {"numpy": 2, "report": 3}
    with pytest.raises(MorphoQuantError, match=message):
        parse_calibration(given)
