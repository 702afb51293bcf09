"""Models of unlisted types from end to end: what is written, what the report says, what vLLM is asked."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import dynamic_module_utils

from calibration import calibrate as module
from calibration.blocks.capture import ADDED, capture_block_inputs
from calibration.calibrate import calibrate
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.model.architectures import find_architecture
from calibration.model.discovery import GENERIC
from calibration.output.inspection import inspect_data
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS, QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.tiny_conversations import write_calibration_data
from tests.tiny_decoders import build_tiny_decoder
from tests.tiny_media_models import build_tiny_qwen3_vl
from tests.tiny_models import build_tiny_llama

RECIPE = Recipe(device="cpu", rounding="nearest", regression=False)


def test_an_unlisted_model_becomes_a_checkpoint_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[QuantizationSpec] = []
    monkeypatch.setattr(module, "check_names", lambda source, spec: asked.append(spec))
    # 240 is no multiple of 32, so down_proj stays in 16 bit.
    model = build_tiny_decoder("phi3", tmp_path / "model", intermediate_size=240)
    with caplog.at_level(logging.INFO):
        report = calibrate(model, write_calibration_data(tmp_path / "data", "text"), tmp_path / "out", recipe=RECIPE)
    spec = verify_checkpoint(tmp_path / "out")
    kept = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]
    assert sorted(spec.layers) == [
        f"model.layers.{block}.{linear}"
        for block in range(2)
        for linear in ("mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    ]
    assert report["architecture"] == GENERIC and report["sixteen_bit"] == kept
    shown = inspect_data(tmp_path / "out")
    assert shown["architecture"] == GENERIC and shown["sixteen_bit"] == kept
    assert [list(plan.layers) for plan in asked] == [list(spec.layers)]
    assert f"phi3: {GENERIC}" in caplog.text
    assert f"{kept[0]} stays in 16 bit: no group size divides its K = 240" in caplog.text


def test_a_name_that_vllm_would_not_find_ends_the_run_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MorphoQuantError("a: no such linear")

    monkeypatch.setattr(module, "check_names", refuse)
    model = build_tiny_decoder("stablelm", tmp_path / "model")
    data = write_calibration_data(tmp_path / "data", "text")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MorphoQuantError, match="a: no such linear"):
        calibrate(model, data, tmp_path / "out", recipe=RECIPE)
    assert sorted(tmp_path.iterdir()) == before


@torch.no_grad()
def test_features_that_qwen3_vl_adds_between_blocks_reach_the_blocks(tmp_path: Path) -> None:
    """Blocks that run one at a time get what they get in the whole model."""
    source = build_tiny_qwen3_vl(tmp_path / "model")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    ids = find_architecture({"model_type": "qwen3_vl"}).placeholder_token_ids(model.config.to_dict())
    conversations = load_conversations(write_calibration_data(tmp_path / "data", "vl"))
    samples = build_samples(
        source, conversations, max_tokens=512, max_samples=None, placeholder_token_ids=ids, rows=DEFAULT_ROWS
    )
    blocks = list(model.model.language_model.layers)
    given: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(_note(given), with_kwargs=True) for block in blocks]
    for sample in samples:
        model(**sample.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    whole = iter(given)
    head = model.lm_head
    added = 0
    for entry in capture_block_inputs(model, blocks, samples, [torch.arange(2)] * len(samples)):
        hidden = entry.hidden
        for block, passed in zip(blocks, entry.arguments, strict=True):
            if ADDED in passed:
                hidden, added = hidden + passed[ADDED], added + 1
            torch.testing.assert_close(hidden, next(whole), rtol=1e-5, atol=1e-5)
            hidden = block(hidden, **{name: value for name, value in passed.items() if name != ADDED})
    model.lm_head = head
    # Two features for each of the samples with a medium.
    assert added == 2 * sum(bool((sample.modality != 0).any()) for sample in samples) > 0


def _note(given: list[Tensor]) -> Any:
    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    return note


# Code as publishers put it beside the weights; it leaves a mark when it runs.
_REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(MARK).touch()


class FarConfig(LlamaConfig):
    model_type = "far"


class FarForCausalLM(LlamaForCausalLM):
    config_class = FarConfig
"""


def test_code_of_the_models_directory_runs_on_request_alone_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_names", lambda source, spec: None)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = build_tiny_llama(tmp_path / "model"), tmp_path / "ran"
    (model / "far.py").write_text(_REMOTE.replace("MARK", repr(str(mark))))
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "far.FarConfig", "AutoModelForCausalLM": "far.FarForCausalLM"}
    changes = {"model_type": "far", "architectures": ["FarForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    data = write_calibration_data(tmp_path / "data", "text")
    with pytest.raises(MorphoQuantError, match="FarForCausalLM is code in the model's directory"):
        calibrate(model, data, tmp_path / "out", recipe=RECIPE)
    assert not mark.exists()
    trusting = RECIPE.model_copy(update={"trust_remote_code": True})
    report = calibrate(model, data, tmp_path / "out", recipe=trusting)
    assert mark.exists()
    assert report["remote_code"] == "far.FarForCausalLM" and report["architecture"] == GENERIC
    assert len(verify_checkpoint(tmp_path / "out").layers) == 14
