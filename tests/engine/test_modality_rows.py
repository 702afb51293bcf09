"""Every token of a running engine is quantized by its own modality's row: in each regime, token by token.

The truth is where a request's media lie (tests/engine/recording.py), never a token id. The checkpoint's rows differ, so
that a wrong row is also seen in the model's output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor

from tests.differing_rows import write_differing_rows
from tests.engine.conftest import REPOSITORY
from tests.reference_model import Checkpoint, reference_thinker
from tests.tiny_conversations import image_bytes, sound_bytes, write_video

pytestmark = pytest.mark.slow

IMAGE, AUDIO, VIDEO = (
    f"<|{kind}_bos|><|{token}|><|{kind}_eos|>"
    for kind, token in (("vision", "IMAGE"), ("audio", "AUDIO"), ("vision", "VIDEO"))
)
# A step of 64 tokens is less than most prompts: they are prefilled in chunks, beside others that decode already.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 2, "audio": 2, "video": 1},
    # Few tokens of a picture; two seconds between pairs of frames, so that sound comes between them.
    "mm_processor_kwargs": {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28, "fps": 1.0},
}
# vLLM and transformers sum in another order, as in test_serve.
LOGPROB_TOLERANCE = 1e-3
# Which of the prompts the reference model computes, too.
QUESTION = 1


@pytest.fixture(scope="session")
def rows_checkpoint(omni_checkpoint: Path) -> Path:
    return write_differing_rows(omni_checkpoint, omni_checkpoint.with_name("differing rows"))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Text; two images and a sound; a video beside a sound; a video with its sound woven in."""
    directory = tmp_path_factory.mktemp("rows media")
    for index in range(2):
        (directory / f"image{index}.png").write_bytes(image_bytes(20 + index))
    for index, seconds in enumerate((1.5, 1.0, 4.5)):
        (directory / f"sound{index}.wav").write_bytes(sound_bytes(30 + index, seconds))
    write_video(directory / "video.mp4", 41)

    def files(*names: str) -> list[str]:
        return [str(directory / name) for name in names]

    filler = "The user asks the assistant a question and the assistant answers the user. "
    return [
        {"prompt": filler * 12},
        {
            "prompt": f"{IMAGE}Describe the picture.{AUDIO}What can you hear?{IMAGE}" + filler * 6,
            "media": {"image": files("image0.png", "image1.png"), "audio": files("sound0.wav")},
        },
        {
            "prompt": f"The video shows {VIDEO} what? {AUDIO}",
            "media": {"video": files("video.mp4"), "audio": files("sound1.wav")},
        },
        {
            "prompt": f"In this {VIDEO}what can you hear?",
            "media": {"video": files("video.mp4"), "audio": files("sound2.wav")},
            "mm_processor_kwargs": {"use_audio_in_video": True},
        },
    ]


def run_jobs(directory: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run engines one after another in a process of its own; what each recorded, and "log" of all of them."""
    lines = [{**job, "output": str(directory / f"{name}.json")} for name, job in jobs.items()]
    (directory / "jobs.json").write_text(json.dumps(lines))
    cores = sorted(os.sched_getaffinity(0))
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    log = directory / "engines.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.driver_rows", str(directory / "jobs.json")],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1800,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": threads},
        )
    text = log.read_text(errors="replace")
    assert done.returncode == 0, "\n".join(text.splitlines()[-60:])
    return {name: json.loads(Path(line["output"]).read_text()) for name, line in zip(jobs, lines, strict=True)} | {
        "log": text
    }


def without_log_probabilities(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """A pass that may use cached prefixes: vLLM computes log probabilities of a prompt only from its first token on."""
    return {"prompts": prompts}


@pytest.fixture(scope="module")
def recorded(
    rows_checkpoint: Path, prompts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Two engines: one that switches rows, at last with a wrong table; one that cannot."""
    rows = Checkpoint(rows_checkpoint).spec.rows
    fresh = {"prompts": prompts, "prompt_logprobs": True}
    passes = {
        "fresh": fresh,
        "again": without_log_probabilities(prompts),
        "wrong table": {**fresh, "swap": [rows.index("image"), rows.index("audio")]},
    }
    job = {"model": str(rows_checkpoint), "engine": ENGINE, "passes": passes}
    fallback = {**job, "engine": {**ENGINE, "enable_prompt_embeds": True}, "passes": {"fresh": fresh}}
    return run_jobs(tmp_path_factory.mktemp("rows"), {"eager": job, "fallback": fallback})


def kinds_and_rows(result: dict[str, Any], spec_rows: tuple[str, ...]) -> list[tuple[list[str], list[str]]]:
    """What lies at each token of a step, and the row it was given; for every step of every rank."""
    return [
        ([kind for part in step["tokens"] for kind in part["kinds"]], [spec_rows[row] for row in step["rows"]])
        for worker in result["workers"]
        for step in worker["steps"]
    ]


def assert_every_token_has_its_row(result: dict[str, Any], spec_rows: tuple[str, ...], ranks: int = 1) -> None:
    assert len(result["workers"]) == ranks
    for worker in result["workers"]:
        assert worker["buffers"] == 1 and worker["layers"] == 8, "two blocks of four linears read one buffer"
    steps = kinds_and_rows(result, spec_rows)
    for kinds, rows in steps:
        assert rows == kinds
    # Where prefixes are cached, the images are not computed again.
    assert {kind for kinds, _ in steps for kind in kinds} >= {"text", "video", "audio"}


def shape_of_steps(result: dict[str, Any]) -> Counter[str]:
    """How often a step was of a kind that could go wrong in its own way."""
    shapes: Counter[str] = Counter()
    for step in result["workers"][0]["steps"]:
        prefills = [part for part in step["tokens"] if part["first"] < part["prompt"]]
        decodes = len(step["tokens"]) - len(prefills)
        shapes["mixed"] += bool(prefills) and decodes > 0
        shapes["decode only"] += not prefills
        shapes["several requests with media"] += sum(set(part["kinds"]) != {"text"} for part in prefills) > 1
        for part in prefills:
            inside = part["kinds"][0] != "text" and part["first"] > 0
            shapes["chunk starts inside a medium"] += inside
            # Only where sound is woven into a video does no text lie between the two.
            shapes["interleaved"] += ("audio", "video") in pairwise(part["kinds"])
    return shapes


def reference_logprobs(model: nn.Module, source: Path, prompt: dict[str, Any]) -> torch.Tensor:
    """Log probability of every token of the prompt but the first."""
    inputs = AutoProcessor.from_pretrained(source)(
        text=[prompt["prompt"]],
        images=[Image.open(path).convert("RGB") for path in prompt["media"]["image"]],
        audio=[soundfile.read(path, dtype="float32")[0] for path in prompt["media"]["audio"]],
        return_tensors="pt",
        min_pixels=ENGINE["mm_processor_kwargs"]["min_pixels"],
        max_pixels=ENGINE["mm_processor_kwargs"]["max_pixels"],
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, inputs["input_ids"][0, 1:, None]).flatten()


@pytest.fixture(scope="module")
def by_modality(omni_source: Path, rows_checkpoint: Path, prompts: list[dict[str, Any]]) -> torch.Tensor:
    model = reference_thinker(omni_source, Checkpoint(rows_checkpoint))
    return reference_logprobs(model, omni_source, prompts[QUESTION])


@pytest.fixture(scope="module")
def by_any(omni_source: Path, rows_checkpoint: Path, prompts: list[dict[str, Any]]) -> torch.Tensor:
    model = reference_thinker(omni_source, Checkpoint(rows_checkpoint), by_modality=False)
    return reference_logprobs(model, omni_source, prompts[QUESTION])


def served_logprobs(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(result["requests"][QUESTION]["prompt_logprobs"])


def spec_rows(checkpoint: Path) -> tuple[str, ...]:
    return Checkpoint(checkpoint).spec.rows


def test_each_token_takes_its_row_in_mixed_chunked_and_interleaved_steps(
    recorded: dict[str, Any], rows_checkpoint: Path
) -> None:
    result = recorded["eager"]["fresh"]
    assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    assert "image" in {kind for kinds, _ in kinds_and_rows(result, spec_rows(rows_checkpoint)) for kind in kinds}
    shapes = shape_of_steps(result)
    for shape in ("mixed", "decode only", "several requests with media", "chunk starts inside a medium", "interleaved"):
        assert shapes[shape], f"no step was: {shape}"


def test_each_token_takes_its_row_where_prefixes_are_cached(recorded: dict[str, Any], rows_checkpoint: Path) -> None:
    result = recorded["eager"]["again"]
    assert [request["cached"] > 0 for request in result["requests"]] == [True, True, False, True]
    assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    assert shape_of_steps(result)["chunk starts inside a medium"]


def test_served_output_is_the_references_with_the_same_rows(
    recorded: dict[str, Any], by_modality: torch.Tensor, by_any: torch.Tensor
) -> None:
    served = served_logprobs(recorded["eager"]["fresh"])
    torch.testing.assert_close(served, by_modality, atol=LOGPROB_TOLERANCE, rtol=0)
    assert float((served - by_any).abs().max()) > 100 * LOGPROB_TOLERANCE, "other rows would be seen"


def test_wrong_ids_are_seen(recorded: dict[str, Any], rows_checkpoint: Path, by_modality: torch.Tensor) -> None:
    """The negative control: the checks above fail when the bus takes images for sounds."""
    result = recorded["eager"]["wrong table"]
    with pytest.raises(AssertionError):
        assert_every_token_has_its_row(result, spec_rows(rows_checkpoint))
    swapped = {"image": "audio", "audio": "image"}
    for kinds, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)):
        assert rows == [swapped.get(kind, kind) for kind in kinds]
    assert float((served_logprobs(result) - by_modality).abs().max()) > 100 * LOGPROB_TOLERANCE


def test_the_fallback_has_exactly_the_numerics_of_any(
    recorded: dict[str, Any], rows_checkpoint: Path, by_any: torch.Tensor
) -> None:
    result = recorded["fallback"]["fresh"]
    assert {row for _, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)) for row in rows} == {"any"}
    torch.testing.assert_close(served_logprobs(result), by_any, atol=LOGPROB_TOLERANCE, rtol=0)


def test_the_mode_is_logged_once_with_the_reason(recorded: dict[str, Any]) -> None:
    lines = [line.split("MorphoQuant: ")[1] for line in recorded["log"].splitlines() if "MorphoQuant: " in line]
    assert len(lines) == 2
    assert lines[0].startswith("every token is quantized by its modality's row; placeholder tokens {'image': [")
    assert lines[1] == "row 'any' quantizes the tokens of every modality (prompts may come as embeddings)"


# What is served with rows, and what is not and why.
SWITCHING: dict[str, dict[str, Any]] = {
    "compiled": {"enforce_eager": False},
    "whole prompts": {"max_num_batched_tokens": 2048},
    "two ranks": {"tensor_parallel_size": 2},
    "two ranks compiled": {"tensor_parallel_size": 2, "enforce_eager": False},
}
NOT_SWITCHING: dict[str, tuple[dict[str, Any], str]] = {
    "two stages": ({"pipeline_parallel_size": 2}, "pipeline parallelism: later ranks see no token ids"),
    "LoRA": ({"enable_lora": True, "max_lora_rank": 8}, "LoRA: its embedding bypasses the hook"),
}


@pytest.fixture(scope="module")
def regimes(
    rows_checkpoint: Path, prompts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    settings = {**SWITCHING, **{name: changes for name, (changes, _) in NOT_SWITCHING.items()}}
    passes = {"fresh": {"prompts": prompts, "prompt_logprobs": True}, "again": without_log_probabilities(prompts)}
    # vLLM computes no log probabilities of prompts under pipeline parallelism.
    jobs = {
        name: {
            "model": str(rows_checkpoint),
            "engine": {**ENGINE, **changes},
            "passes": passes if name != "two stages" else {"fresh": without_log_probabilities(prompts)},
        }
        for name, changes in settings.items()
    }
    return run_jobs(tmp_path_factory.mktemp("regimes"), jobs)


@pytest.mark.full
@pytest.mark.parametrize("regime", list(SWITCHING))
def test_each_token_takes_its_row_in_every_regime(
    regimes: dict[str, Any], rows_checkpoint: Path, by_modality: torch.Tensor, regime: str
) -> None:
    ranks = SWITCHING[regime].get("tensor_parallel_size", 1)
    for result in regimes[regime].values():
        assert_every_token_has_its_row(result, spec_rows(rows_checkpoint), ranks)
    torch.testing.assert_close(served_logprobs(regimes[regime]["fresh"]), by_modality, atol=LOGPROB_TOLERANCE, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("regime", list(NOT_SWITCHING))
def test_what_the_hook_cannot_see_is_served_with_any(
    regimes: dict[str, Any], rows_checkpoint: Path, by_any: torch.Tensor, regime: str
) -> None:
    result = regimes[regime]["fresh"]
    assert {row for _, rows in kinds_and_rows(result, spec_rows(rows_checkpoint)) for row in rows} == {"any"}
    assert f"row 'any' quantizes the tokens of every modality ({NOT_SWITCHING[regime][1]})" in regimes["log"]
    if regime != "two stages":
        torch.testing.assert_close(served_logprobs(result), by_any, atol=LOGPROB_TOLERANCE, rtol=0)
