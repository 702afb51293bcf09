"""A checkpoint's files beside its weights: a changed vocabulary is refused, changed settings are told."""

import json
import os
from pathlib import Path

import pytest

from calibration.output.written_files import copied_files
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.beside import changed_settings, check_decisive, digests_beside
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.pooling import read_modules
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import remarks, verify_checkpoint
from tests.checkpoints import seal_again, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused
from tests.tiny_embedders import add_pooling

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "qwen.tiktoken")
EMBEDDING = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
)
DECISIVE = (*VOCABULARY, *EMBEDDING)
# Those of lists without a version.
FIRST_SETTINGS = ("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
SETTINGS = (
    *(*FIRST_SETTINGS, "modeling_own.py", "configuration.json", "feature_extractor_config.json", "spk_dict.pt"),
    *("additional_chat_templates/tools.jinja", "LICENSE"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "whole"
    write_random_checkpoint(directory, single_file=True)
    add_pooling(directory)
    for name in (*VOCABULARY, *SETTINGS):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps({"file": name}))
    seal_again(directory)
    return directory


def test_all_that_decides_what_is_read_is_listed(checkpoint: Path) -> None:
    spec = verify_checkpoint(checkpoint)
    assert spec.integrity is not None and set(spec.integrity.beside) == {*DECISIVE, *SETTINGS}
    assert {path.as_posix() for path in copied_files(checkpoint)} == {*DECISIVE, *SETTINGS}
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert remarks(checkpoint, spec) == []


@pytest.mark.parametrize("name", DECISIVE)
def test_another_vocabulary_or_pooling_or_none_is_refused(checkpoint: Path, name: str) -> None:
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
    check_decisive(tmp_path, {})


ADDED = (
    *("modules.json", "processor_config.json", "generation_config.json", "modeling_own.py", "chat_template.jinja"),
    "additional_chat_templates/tools.jinja",
)


@pytest.mark.parametrize("name", [*ADDED, "LICENSE", "notes.txt"])
def test_each_added_file_that_a_server_reads_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    listed = digests_beside(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("new")
    assert changed_settings(tmp_path, listed) == ([name] if name in ADDED else [])


@pytest.mark.parametrize("folder", ["steps/circle", "n" * 300, "1_Pooling.json"])
def test_a_folder_of_a_step_that_cannot_be_followed_is_told(tmp_path: Path, folder: str) -> None:
    """Such a modules.json came after the calibration."""
    write_random_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    seal_again(tmp_path)
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "circle").symlink_to("circle")
    (tmp_path / "1_Pooling.json").write_text("{}")
    steps = [{"path": folder, "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(MorphoQuantError, match="is no folder below the model's directory"):
        read_modules(tmp_path)
    spec = verify_checkpoint(tmp_path)
    assert [line.split()[0] for line in remarks(tmp_path, spec)] == ["modules.json"]


def test_a_list_without_a_version_says_nothing_of_files_that_it_did_not_cover(checkpoint: Path) -> None:
    """Checkpoints from before it listed only vocabulary and the settings of the first list."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    integrity = config["quantization_config"]["integrity"]
    del integrity["beside_version"]
    integrity["beside"] = {name: integrity["beside"][name] for name in (*VOCABULARY, *FIRST_SETTINGS)}
    path.write_text(json.dumps(config))
    spec = verify_checkpoint(checkpoint)
    assert remarks(checkpoint, spec) == []
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for name in ("modeling_own.py", "1_Pooling/config.json"):
        (checkpoint / name).write_text("changed")
    verify_checkpoint(checkpoint)
    assert remarks(checkpoint, spec) == []
    # These it would have named.
    for name in ("processor_config.json", "vocab.txt"):
        (checkpoint / name).write_text("{}")
    assert [line.split()[0] for line in remarks(checkpoint, spec)] == ["processor_config.json", "vocab.txt"]


INSIDE = {"bytes": 1, "sha256": "x"}


@pytest.mark.parametrize("version", [None, "2", 1.5, True])
def test_a_version_of_another_kind_is_refused(checkpoint: Path, version: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["integrity"]["beside_version"] = version
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(MorphoQuantError, match="quantization_config is malformed"):
        read_spec(checkpoint)


@pytest.mark.parametrize(
    "value", [None, 7, [1], {"a": 1}, *({name: INSIDE} for name in ("../a", "a/../../b", "/a", "a//b", "./a", ""))]
)
def test_a_list_of_another_kind_is_refused(checkpoint: Path, value: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["integrity"]["beside"] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(MorphoQuantError, match="quantization_config is malformed"):
        read_spec(checkpoint)
