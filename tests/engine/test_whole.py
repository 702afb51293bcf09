"""Incomplete checkpoints are refused before a worker starts; complete ones pass vLLM's check, by path and by hub id."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE
from tests import tiny_models
from tests.checkpoints import flip_bit
from tests.engine.conftest import ENGINE, TEXT_PROMPT
from tests.engine.rows import REPOSITORY
from tests.hub_cache import write_hub_cache
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.slow

CODES = "model.layers.0.mlp.down_proj.weight_codes"
QUICK = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
TRACKED = {**ENGINE, "model_loader_extra_config": {"enable_weights_track": True}}


@pytest.fixture(scope="module")
def text_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama`, whose head is its embedding, `qwen2`, which has a head of its own, and llama's source."""
    directory = tmp_path_factory.mktemp("whole")
    data = write_calibration_data(directory / "data", "text")
    for name, build in (("llama", tiny_models.build_tiny_llama), ("qwen2", tiny_models.build_tiny_qwen2)):
        calibrate(build(directory / f"{name}-source"), data, directory / name, recipe=QUICK)
    return directory


def without(*starts: str) -> Callable[[Path], None]:
    """Take tensors whose names start so out of files and index, and layers out of config.json, as if never written."""

    def take(directory: Path) -> None:
        index = json.loads((directory / INDEX_FILE).read_text())
        for file in set(index["weight_map"].values()):
            with safe_open(str(directory / file), "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            (directory / file).unlink()
            save_file({name: value for name, value in tensors.items() if not name.startswith(starts)}, directory / file)
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.startswith(starts)}
        (directory / INDEX_FILE).write_text(json.dumps(index))
        config = json.loads((directory / CONFIG_FILE).read_text())
        layers = config["quantization_config"]["layers"]
        for name in [name for name in layers if name.startswith(starts)]:
            del layers[name]
        (directory / CONFIG_FILE).write_text(json.dumps(config))

    return take


def changed(**fields: Any) -> Callable[[Path], None]:
    """Change fields of config.json."""

    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG_FILE).read_text())
        (directory / CONFIG_FILE).write_text(json.dumps({**config, **fields}))

    return change


@pytest.mark.parametrize(
    ("model", "damage", "expected"),
    [
        ("qwen2", without("model.norm."), "tensor model.norm.weight is missing"),
        ("qwen2", without("model.layers.1.input_layernorm."), "tensor model.layers.1.input_layernorm.weight is missi"),
        ("qwen2", without("model.embed_tokens."), "tensor model.embed_tokens.weight is missing"),
        ("qwen2", without("lm_head."), "tensor lm_head.weight is missing"),
        ("qwen2", without("model.layers.1."), "its settings changed after the checkpoint was made"),
        ("qwen2", without("model.layers.1.mlp."), "its settings changed after the checkpoint was made"),
        # A Llama: for a Qwen2, transformers itself counts the kinds of layers.
        ("llama", changed(num_hidden_layers=3), "num_hidden_layers changed after the checkpoint was made"),
        ("llama", changed(num_hidden_layers=1), "num_hidden_layers changed after the checkpoint was made"),
        ("qwen2", changed(tie_word_embeddings=True), "tie_word_embeddings changed after the checkpoint was made"),
        ("llama", changed(tie_word_embeddings=False), "tie_word_embeddings changed after the checkpoint was made"),
    ],
)
def test_what_is_missing_is_refused_while_the_engine_is_configured(
    text_checkpoints: Path, tmp_path: Path, model: str, damage: Callable[[Path], None], expected: str
) -> None:
    directory = Path(shutil.copytree(text_checkpoints / model, tmp_path / model))
    configure(directory)
    damage(directory)
    with pytest.raises(Exception, match=expected) as caught:
        configure(directory)
    lines = [line for line in str(caught.value).splitlines() if expected in line]
    # vLLM gives no location for quantization_config alone.
    assert len(lines) == 1 and (str(directory) in lines[0] or lines[0].startswith("quantization_config: "))


def configure(directory: Path) -> None:
    """vLLM's steps before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(directory), dtype="float32", max_model_len=128).create_engine_config()


@pytest.fixture(scope="module")
def served(text_checkpoints: Path, omni_checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Results of engines, started one after another in one process that knows the hub by its local cache alone."""
    llama = text_checkpoints / "llama"
    home = text_checkpoints / "hub home"
    write_hub_cache(home / "hub", "tests/whole", llama)
    write_hub_cache(home / "hub", "tests/missing", llama, without("model.norm."))
    write_hub_cache(home / "hub", "tests/damaged", llama, lambda files: flip_bit(files, CODES))
    draft = {"model": str(llama), "num_speculative_tokens": 2, "method": "draft_model"}
    speculative = {**ENGINE, "speculative_config": draft, "disable_log_stats": False}
    jobs: dict[str, dict[str, Any]] = {
        "hub": {"model": "tests/whole", "engine": TRACKED},
        "hub, missing": {"model": "tests/missing", "engine": ENGINE},
        "hub, damaged": {"model": "tests/damaged", "engine": ENGINE},
        "path": {"model": str(llama), "engine": ENGINE},
        "omni": {"model": str(omni_checkpoint), "engine": TRACKED},
        "16 bit": {"model": str(text_checkpoints / "llama-source"), "engine": ENGINE},
        "16 bit, draft": {"model": str(text_checkpoints / "llama-source"), "engine": speculative},
        "path, draft": {"model": str(llama), "engine": speculative},
    }
    prompts = [{"prompt_token_ids": TEXT_PROMPT}, {"prompt_token_ids": list(range(100, 130))}]
    lines = [
        {"prompts": prompts, "max_tokens": 24, **job, "output": str(text_checkpoints / f"{index}.json")}
        for index, job in enumerate(jobs.values())
    ]
    (text_checkpoints / "jobs.json").write_text(json.dumps(lines))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.driver", str(text_checkpoints / "jobs.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads(Path(line["output"]).read_text()) for name, line in zip(jobs, lines, strict=True)}


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [request["token_ids"] for request in result["requests"]]


def test_every_parameter_is_loaded_by_vllms_own_count(served: dict[str, dict[str, Any]]) -> None:
    """vLLM leaves its check of missing weights off for quantized models; with it on, ours load."""
    for name in ("hub", "omni"):
        assert len(tokens(served[name])[0]) == 24, served[name].get("error")
    assert tokens(served["hub"]) == tokens(served["path"])


def test_a_checkpoint_in_the_hubs_cache_is_refused_like_one_on_a_path(served: dict[str, dict[str, Any]]) -> None:
    assert "tensor model.norm.weight is missing" in served["hub, missing"]["error"][-1]
    assert "is damaged (its SHA-256 is not the recorded one)" in served["hub, damaged"]["error"][-1]


def test_a_checkpoint_drafts_and_the_answers_are_the_targets(served: dict[str, dict[str, Any]]) -> None:
    for target in ("16 bit", "path"):
        assert tokens(served[f"{target}, draft"]) == tokens(served[target])
    # A draft of wrong numbers changes no answer, but its tokens are not taken: those of the same model all are.
    assert served["path, draft"]["accepted"] >= 0.9 * served["path, draft"]["drafted"] > 0
