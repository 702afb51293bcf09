from pathlib import Path

import pytest

from benchmarks.common import corpus
from morphoquant_vllm.errors import MorphoQuantError


def test_a_missing_corpus_is_one_line_with_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "REQUIREMENT", "./no-such-file.tar.gz")
    with pytest.raises(MorphoQuantError, match=r"pip cannot download \./no-such-file\.tar\.gz \(.+\); connect to"):
        corpus.fetch(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
