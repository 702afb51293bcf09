"""Steps of an embedding model that vLLM would leave out are refused before any work."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibration.calibrate import calibrate, dry_run
from calibration.model.embedders import check_modules
from calibration.output.places import check_output
from calibration.output.written_files import copied_files
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.verify import remarks, verify_checkpoint
from tests.calibration.built_models import TinyModels
from tests.morphoquant_vllm.refusal import refused
from tests.tiny_embedders import POOLING_FILES, add_pooling, build_tiny_embedder, modules

RECIPE = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """A directory with modules.json and the folders that it names, but without a model."""
    directory = tmp_path / "model"
    directory.mkdir()
    add_pooling(directory)
    return directory


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(MorphoQuantError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_has_all_files_that_make_the_vector_and_keeps_them(tiny: TinyModels, tmp_path: Path) -> None:
    source, output = build_tiny_embedder(tmp_path / "source"), tmp_path / "out"
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"opaque")
    (source / "9_Dense").mkdir()
    (source / "9_Dense" / "model.safetensors").write_bytes(b"named by no module")
    calibrate(source, tiny.data("qwen2"), output, recipe=RECIPE)
    spec = verify_checkpoint(output)
    assert spec.integrity is not None and set(POOLING_FILES) <= spec.integrity.beside.keys()
    assert remarks(output, spec) == []
    for name in POOLING_FILES:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert not (output / "9_Dense").exists() and not (output / "2_Dense" / "pytorch_model.bin").exists()
    check_output(output, source, overwrite=True)
    (output / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    refused(output, "1_Pooling/config.json: is not the file of the model that was calibrated")
    (output / "1_Pooling" / "config.json").unlink()
    refused(output, "1_Pooling/config.json: is missing")
    verify_checkpoint(output, complete=False)


def test_a_whole_list_of_steps_passes(steps: Path) -> None:
    check_modules(steps)
    assert {path.as_posix() for path in copied_files(steps)} == set(POOLING_FILES)


@pytest.mark.parametrize("folder", ["../x", "/etc", "1_Pooling/../../x", ".hidden", "link", "a\nb"])
def test_a_folder_outside_the_model_is_refused_and_not_copied(steps: Path, folder: str) -> None:
    (steps.parent / "x").mkdir()
    (steps.parent / "x" / "config.json").write_text("{}")
    (steps / "link").symlink_to(steps.parent / "x")
    (steps / "modules.json").write_text(json.dumps(modules({"": "Transformer", folder: "Pooling"})))
    assert "is no folder below the model's directory" in refusal(lambda: check_modules(steps))
    assert not any("config.json" in path.parts for path in copied_files(steps))


@pytest.mark.parametrize("kind", ["sentence_transformers.models.LSTM", "custom_st.Transformer", "own.Pooling"])
def test_a_step_that_vllm_leaves_out_is_refused_by_its_name(steps: Path, kind: str) -> None:
    entries = json.loads((steps / "modules.json").read_text())
    entries[1]["type"] = kind
    (steps / "modules.json").write_text(json.dumps(entries))
    assert f"modules.json: {kind} is not supported: vLLM would leave it out" in refusal(lambda: check_modules(steps))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"0_Transformer": "Transformer"}, "its Transformer lies in 0_Transformer"),
        ({"": "Pooling"}, "has no folder of its own"),
        ({"": "Transformer", "7_Pooling": "Pooling"}, "7_Pooling/config.json: no such file"),
    ],
)
def test_a_step_that_vllm_would_not_find_is_refused(steps: Path, kinds: dict[str, str], expected: str) -> None:
    (steps / "modules.json").write_text(json.dumps(modules(kinds)))
    assert expected in refusal(lambda: check_modules(steps))


@pytest.mark.parametrize("content", ["{}", "[", "[1]", '[{"type": "x"}]', '[{"type": 1, "path": ""}]'])
def test_a_damaged_list_of_steps_is_refused(steps: Path, content: str) -> None:
    (steps / "modules.json").write_text(content)
    assert "modules.json: " in refusal(lambda: check_modules(steps))


def test_a_projection_must_be_safetensors_that_vllm_reads(steps: Path) -> None:
    weights = steps / "2_Dense" / "model.safetensors"
    save_file({"kernel": torch.ones(2, 2)}, weights)
    assert "holds no weight that vLLM looks for" in refusal(lambda: check_modules(steps))
    weights.write_bytes(b"damaged")
    assert "truncated or not safetensors" in refusal(lambda: check_modules(steps))
    weights.unlink()
    assert "model.safetensors: missing" in refusal(lambda: check_modules(steps))
    (steps / "2_Dense" / "pytorch_model.bin").write_bytes(b"opaque")
    assert "save the folder's weights as safetensors" in refusal(lambda: check_modules(steps))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}, "pools by weightedmean_tokens"),
        ({"pooling_mode_cls_token": True}, "pools by mean_tokens and cls_token"),
        ({"pooling_mode_mean_tokens": False}, "pools by nothing, but vLLM pools by one of cls, "),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": False}, "pools by max"),
    ],
)
def test_a_pooling_that_vllm_would_replace_is_refused(steps: Path, changes: dict[str, object], expected: str) -> None:
    path = steps / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert expected in refusal(lambda: check_modules(steps))


@pytest.mark.parametrize("mode", ["cls_token", "lasttoken"])
def test_other_poolings_of_vllm_pass(steps: Path, mode: str) -> None:
    (steps / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    check_modules(steps)


def test_an_activation_that_vllm_does_not_know_is_refused(steps: Path) -> None:
    path = steps / "2_Dense" / "config.json"
    names = {"torch.nn.modules.activation.Tanh": True, "torch.nn.modules.activation.LeakyReLU": False}
    for name, taken in (names | {"tanh": True, "identity": False, "own.Tanh": False}).items():
        changed = {"activation_function": name}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        if taken:
            check_modules(steps)
        else:
            assert "vLLM does not know its activation_function" in refusal(lambda: check_modules(steps))


def test_steps_in_an_order_that_vllm_does_not_take_are_refused(steps: Path) -> None:
    entries = json.loads((steps / "modules.json").read_text())
    for wrong in ([entries[0], entries[3], entries[1], entries[2]], [*entries[:2], entries[1]]):
        (steps / "modules.json").write_text(json.dumps(wrong))
        assert "but vLLM makes one Transformer, one Pooling" in refusal(lambda: check_modules(steps))


def test_a_fifo_in_a_folder_of_a_step_is_refused(steps: Path) -> None:
    os.mkfifo(steps / "1_Pooling" / "more.json")
    assert "more.json: is not a regular file" in refusal(lambda: copied_files(steps))


@pytest.mark.parametrize("change", ["is_causal", "modules"])
def test_the_dry_run_refuses_them_too(change: str, tiny: TinyModels, tmp_path: Path) -> None:
    source = build_tiny_embedder(tmp_path / "source")
    if change == "is_causal":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    else:
        (source / "modules.json").write_text(json.dumps(modules({"": "Transformer", "1_CNN": "CNN"})))
    expected = {"is_causal": "is_causal is not true", "modules": "CNN is not supported"}[change]
    for run in (calibrate, dry_run):
        assert expected in refusal(lambda run=run: run(source, tiny.data("qwen2"), tmp_path / "out"))
