"""Mixtures of experts served: log-probabilities are the reference model's, with text, pictures and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from tests.calibration.rendering import build, conversations
from tests.engine.agreement import LOGPROB_TOLERANCE, TIED_SHARE, assert_same_logprobs
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines, calibrate
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import image_bytes, sound_bytes, write_calibration_data, write_video
from tests.tiny_experts import (
    build_tiny_qwen2_moe,
    build_tiny_qwen3_moe,
    build_tiny_qwen3_omni_moe,
    build_tiny_qwen3_vl_moe,
)

pytestmark = pytest.mark.slow

QUICK = ("--rounding", "nearest", "--no-regression", "--max-samples", "4")
PROMPT = {"prompt_token_ids": TEXT_PROMPT}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
OMNI_MEDIA = "<|vision_bos|><|IMAGE|><|vision_eos|>What is this?<|audio_bos|><|AUDIO|><|audio_eos|>"
QUESTION = "Describe the picture. The user asks the assistant a question and the assistant answers the user. "


class Served:
    """A source model, its checkpoint, and results of engines by name."""

    def __init__(self, source: Path, checkpoint: Path, engines: dict[str, dict[str, Any]]) -> None:
        self.source, self.checkpoint = source, Checkpoint(checkpoint)
        self.started = Engines(source.parent)
        self.started.run({name: {"model": str(checkpoint), **job} for name, job in engines.items()}, timeout=1800)

    def logprobs(self, name: str, request: int = 0) -> torch.Tensor:
        result = self.started.results[name]
        assert "error" not in result, result["error"]
        return torch.tensor(result["requests"][request]["prompt_logprobs"])


def expected_logprobs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log probability of every token of the prompt but the first."""
    with torch.no_grad():
        logprobs = model(**inputs).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, inputs["input_ids"][0, 1:, None]).flatten()


def of_text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([TEXT_PROMPT])}


@pytest.fixture(scope="module")
def text_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe") / "source")


@pytest.fixture(scope="module")
def text_data(text_source: Path) -> Path:
    return write_calibration_data(text_source.with_name("data"), "text")


@pytest.fixture(scope="module")
def text_checkpoint(text_source: Path, text_data: Path) -> Path:
    return calibrate(text_source, text_data, text_source.with_name("checkpoint"), *QUICK)


@pytest.fixture(scope="module")
def text_reference(text_source: Path, text_checkpoint: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(text_source, dtype=torch.float32)
    return expected_logprobs(swap_linears(model, Checkpoint(text_checkpoint)), of_text())


@pytest.fixture(scope="module")
def eager(text_source: Path, text_checkpoint: Path) -> Served:
    return Served(text_source, text_checkpoint, {"eager": {"prompts": [PROMPT], "engine": ENGINE}})


def test_served_logprobs_are_the_reference_models(eager: Served, text_reference: torch.Tensor) -> None:
    assert_same_logprobs(eager.logprobs("eager"), text_reference)
    model = transformers.AutoModelForCausalLM.from_pretrained(eager.source, dtype=torch.float32)
    # A prompt on which 4 bits change nothing would show nothing.
    assert (expected_logprobs(model, of_text()) - text_reference).abs().max() > 0.1


def test_experts_are_quantized_and_routers_are_not(eager: Served) -> None:
    methods = eager.started.results["eager"]["methods"]
    of_experts = {name: method for name, method in methods.items() if name.endswith("routed_experts")}
    assert set(of_experts.values()) == {"MorphoQuantExpertsMethod"}
    assert len(of_experts) == len(eager.checkpoint.spec.experts)
    assert {method for name, method in methods.items() if name.endswith("mlp.gate")} == {"UnquantizedLinearMethod"}


@pytest.fixture(scope="module")
def variants(text_source: Path, text_checkpoint: Path) -> Served:
    ways: dict[str, dict[str, Any]] = {
        "compiled": {"enforce_eager": False},
        "two ranks": {"tensor_parallel_size": 2},
        "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    }
    jobs = {name: {"prompts": [PROMPT], "engine": {**ENGINE, **settings}} for name, settings in ways.items()}
    return Served(text_source, text_checkpoint, jobs)


@pytest.mark.full
@pytest.mark.parametrize("way", ["compiled", "two ranks", "expert parallel"])
def test_every_way_to_serve_gives_the_reference_models_logprobs(
    variants: Served, text_reference: torch.Tensor, way: str
) -> None:
    assert_same_logprobs(variants.logprobs(way), text_reference)


@pytest.fixture(scope="module")
def attention_alone(text_source: Path, text_data: Path) -> Served:
    checkpoint = calibrate(
        text_source,
        text_data,
        text_source.with_name("attention"),
        *QUICK,
        "--ignore",
        "*.experts.*",
    )
    ways: dict[str, dict[str, Any]] = {
        "eager": {},
        "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    }
    jobs = {name: {"prompts": [PROMPT], "engine": {**ENGINE, **settings}} for name, settings in ways.items()}
    return Served(text_source, checkpoint, jobs)


@pytest.mark.full
def test_a_model_whose_attention_alone_is_quantized_is_served(attention_alone: Served) -> None:
    spec = attention_alone.checkpoint.spec
    assert not spec.experts and all("self_attn" in name for name in spec.layers)
    model = transformers.AutoModelForCausalLM.from_pretrained(attention_alone.source, dtype=torch.float32)
    expected = expected_logprobs(swap_linears(model, attention_alone.checkpoint), of_text())
    assert_same_logprobs(attention_alone.logprobs("eager"), expected)


@pytest.mark.full
def test_sixteen_bit_experts_are_refused_under_expert_parallelism_on_a_cpu(attention_alone: Served) -> None:
    causes = " ".join(attention_alone.started.results["expert parallel"]["error"])
    log = (attention_alone.source.parent / "engines.log").read_text(errors="replace")
    assert "vLLM's CPU kernel for 16-bit experts does not know which of them lie on a rank" in causes + log


@pytest.mark.full
def test_shared_experts_are_served_in_4_bit_beside_routed_ones_in_16(tmp_path: Path) -> None:
    source = build_tiny_qwen2_moe(tmp_path / "source")
    data = write_calibration_data(tmp_path / "data", "text")
    checkpoint = calibrate(source, data, tmp_path / "checkpoint", *QUICK, "--ignore", "*.experts.*")
    served = Served(source, checkpoint, {"eager": {"prompts": [PROMPT], "engine": ENGINE}})
    shared = "model.layers.0.mlp.shared_expert"
    assert not served.checkpoint.spec.experts and f"{shared}.down_proj" in served.checkpoint.spec.layers
    methods = served.started.results["eager"]["methods"]
    assert methods[f"{shared}.gate_up_proj"] == "MorphoQuantLinearMethod"
    assert methods["model.layers.0.mlp.shared_expert_gate"] == "UnquantizedLinearMethod"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_same_logprobs(served.logprobs("eager"), expected_logprobs(swap_linears(model, served.checkpoint), of_text()))


# Class of transformers, start of the names in the file, and of the modules; the prompt's media; how to build the model.
MEDIA = {
    "vl": (build_tiny_qwen3_vl_moe, "Qwen3VLMoeForConditionalGeneration", "", PICTURE + QUESTION),
    "omni": (
        build_tiny_qwen3_omni_moe,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "thinker.",
        OMNI_MEDIA + QUESTION,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", list(MEDIA))
def test_a_question_about_media_gets_the_reference_models_logprobs(kind: str, tmp_path: Path) -> None:
    build, class_name, prefix, prompt = MEDIA[kind]
    source = build(tmp_path / "source")
    checkpoint = calibrate(source, write_calibration_data(tmp_path / "data", kind), tmp_path / "checkpoint", *QUICK)
    files = {"image": tmp_path / "image.png"}
    files["image"].write_bytes(image_bytes(11))
    media: dict[str, Any] = {"images": [Image.open(files["image"]).convert("RGB")]}
    if kind == "omni":
        files["audio"] = tmp_path / "sound.wav"
        files["audio"].write_bytes(sound_bytes(12))
        media["audio"] = [soundfile.read(files["audio"], dtype="float32")[0]]
    question = {"prompt": prompt, **{medium: str(path) for medium, path in files.items()}}
    served = Served(source, checkpoint, {"eager": {"prompts": [PROMPT, question], "engine": ENGINE}})
    model = getattr(transformers, class_name).from_pretrained(source, dtype=torch.float32)
    swap_linears(model, served.checkpoint, prefix)
    inputs = transformers.AutoProcessor.from_pretrained(source)(text=[prompt], return_tensors="pt", **media)
    assert_same_logprobs(served.logprobs("eager", 0), expected_logprobs(model, of_text()))
    assert served.started.results["eager"]["requests"][1]["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    assert_same_logprobs(served.logprobs("eager", 1), expected_logprobs(model, dict(inputs)))


@pytest.mark.full
def test_a_clip_gets_the_reference_models_logprobs_on_calibrations_inputs(tmp_path: Path) -> None:
    """Positions of Qwen3-Omni's clips follow from a rate that vLLM and calibration leave to the processor."""
    source = build_tiny_qwen3_omni_moe(tmp_path / "source")
    checkpoint = calibrate(source, write_calibration_data(tmp_path / "data"), tmp_path / "checkpoint", *QUICK)
    # Calibration takes two frames a second, vLLM as many as there are.
    write_video(tmp_path / "clip.mp4", 14, frames=6, rate=2)
    clip = {"type": "video_url", "video_url": {"url": "clip.mp4"}}
    (sample,) = build(source, conversations(tmp_path, [clip, {"type": "text", "text": QUESTION}]))
    assert sample.inputs["video_grid_thw"][0, 0] == 3
    text = AutoTokenizer.from_pretrained(source).apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    prompt = {"prompt": text, "video": str(tmp_path / "clip.mp4")}
    served = Served(source, checkpoint, {"eager": {"prompts": [prompt], "engine": ENGINE}})
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    swap_linears(model, served.checkpoint, "thinker.")
    assert served.started.results["eager"]["requests"][0]["prompt_token_ids"] == sample.inputs["input_ids"][0].tolist()
    expected = expected_logprobs(model, sample.inputs)
    twice = sample.inputs | {"video_second_per_grid": sample.inputs["video_second_per_grid"] / 2}
    # Of 450 tokens a few lie at a tie between two experts, and move by tenths. Another rate moves all others, too.
    assert _apart(served.logprobs("eager"), expected) < TIED_SHARE
    assert _apart(expected_logprobs(model, twice), expected) > 0.5


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() > LOGPROB_TOLERANCE).float().mean())
