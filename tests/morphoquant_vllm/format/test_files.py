"""Files of the wrong type or content are refused at once, in one line."""

import json
import os
from pathlib import Path

import pytest

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import DEEPEST_JSON, read_json
from tests.checkpoints import write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

FILE = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FILE, "tokenizer.json", "notes.txt"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    write_random_checkpoint(tmp_path, single_file=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, f"{name}: is not a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FILE, "tokenizer.json"])
def test_a_link_that_loops(tmp_path: Path, name: str) -> None:
    write_random_checkpoint(tmp_path, single_file=True)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(name)
    refused(tmp_path, name, "symbolic links")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", FILE, "tokenizer_config.json"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    write_random_checkpoint(tmp_path, single_file=True)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    refused(tmp_path, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested too deep"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deep"),
        (json.dumps({"a": [1]}).replace("1", "[" * DEEPEST_JSON + "]" * DEEPEST_JSON), "nested too deep"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[1]", "does not hold a JSON object"),
        ("", "cannot be read as JSON"),
        ('{"a": "\udcff"}', "cannot be read as JSON"),
    ],
)
def test_text_that_is_no_json_object(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MorphoQuantError) as caught:
        read_json(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_error_is_one_short_line_whatever_a_file_holds() -> None:
    message = str(MorphoQuantError("name \x1b[31m\n\ud800 " + "x" * 10_000))
    assert message.startswith(r"name \x1b[31m\n\ud800 xxx")
    assert len(message) < 700
    assert message.isprintable()
