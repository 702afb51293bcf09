"""A checkpoint's files beside its weights: a changed vocabulary is refused, changed settings are told."""

import json
import os
from pathlib import Path

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.beside import changed_settings, check_vocabulary, digests_beside
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import remarks, verify_checkpoint
from tests.checkpoints import seal_again, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "qwen.tiktoken")
SETTINGS = ("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "whole"
    write_random_checkpoint(directory, single_file=True)
    for name in (*VOCABULARY, *SETTINGS, "LICENSE"):
        (directory / name).write_text(json.dumps({"file": name}))
    seal_again(directory)
    return directory


def test_all_that_decides_what_is_read_is_listed(checkpoint: Path) -> None:
    spec = verify_checkpoint(checkpoint)
    assert spec.integrity is not None and set(spec.integrity.beside) == {*VOCABULARY, *SETTINGS}
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert remarks(checkpoint, spec) == []


@pytest.mark.parametrize("name", VOCABULARY)
def test_another_vocabulary_or_none_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(json.dumps({"file": "of another model"}))
    refused(checkpoint, f"{name}: is not the file of the model that was calibrated")
    verify_checkpoint(checkpoint, checksums=False)
    (checkpoint / name).unlink()
    refused(checkpoint, f"{name}: is missing or no file; copy it from the model that was calibrated")
    # A hub's cache gets it later.
    verify_checkpoint(checkpoint, complete=False)


def test_a_fifo_is_refused_and_not_waited_for(checkpoint: Path) -> None:
    (checkpoint / "merges.txt").unlink()
    os.mkfifo(checkpoint / "merges.txt")
    refused(checkpoint, "merges.txt")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_may_change_and_are_told(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{}")
    spec = verify_checkpoint(checkpoint)
    for complete in (False, True):
        assert [line.split()[0] for line in remarks(checkpoint, spec, complete=complete)] == [name]
    (checkpoint / name).unlink()
    assert [line.split()[0] for line in remarks(checkpoint, spec)] == [name]
    assert remarks(checkpoint, spec, complete=False) == []


def test_a_new_chat_template_and_a_new_vocabulary_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    listed = digests_beside(tmp_path)
    for name in ("chat_template.jinja", "notes.txt", "tekken.json"):
        (tmp_path / name).write_text("new")
    assert changed_settings(tmp_path, listed) == ["chat_template.jinja", "tekken.json"]
    # The list of an older checkpoint says nothing.
    assert changed_settings(tmp_path, {}) == []
    check_vocabulary(tmp_path, {})


@pytest.mark.parametrize("value", [None, 7, [1], {"a": 1}, {"../a": {"bytes": 1, "sha256": "x"}}])
def test_a_list_of_another_kind_is_refused(checkpoint: Path, value: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["integrity"]["beside"] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(MorphoQuantError, match="quantization_config is malformed"):
        read_spec(checkpoint)
