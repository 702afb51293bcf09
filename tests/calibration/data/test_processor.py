import json
from pathlib import Path

import pytest

from calibration.data.processor import load_processor
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.built_models import TinyModels
from tests.calibration.rendering import copy_without_template


def test_a_directory_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="no such model directory"):
        load_processor(tmp_path / "gone")
    with pytest.raises(MorphoQuantError, match=r"no usable tokenizer or processor .*; copy its files"):
        load_processor(tmp_path)


def test_code_in_the_model_directory_is_not_run(tiny: TinyModels, tmp_path: Path) -> None:
    copy_without_template(tiny.model("llama"), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(MorphoQuantError, match="no usable tokenizer"):
        load_processor(tmp_path)


def test_a_tokenizer_without_a_vocabulary_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    for file in tiny.model("llama").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MorphoQuantError, match=r"has no vocabulary; copy tokenizer\.json into"):
        load_processor(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null", '{"model": 3}', "[" * 20_000, '{"added_tokens_decoder": 1}'])
def test_damaged_files_are_refused_in_one_line(name: str, content: str, tiny: TinyModels, tmp_path: Path) -> None:
    """Or not needed: then the processor works without."""
    copy_without_template(tiny.model("llama"), tmp_path)
    (tmp_path / name).write_text(content)
    try:
        processor = load_processor(tmp_path)
    except MorphoQuantError as error:
        assert str(error).startswith(f"{tmp_path}: ") and "cop" in str(error) and "\n" not in str(error)
    else:
        assert name == "tokenizer_config.json" and processor("a note")["input_ids"]
