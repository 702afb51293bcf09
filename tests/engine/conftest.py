"""Models, a checkpoint made by the real command, and engines started once for many assertions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file
from transformers import AutoProcessor

from benchmarks.common.server import Server, serve
from tests import tiny_models
from tests.differing_rows import write_differing_rows
from tests.engine.jobs import cores_of_ranks
from tests.engine.rows import AUDIO, IMAGE, QUESTION, REPOSITORY, VIDEO, reference_logprobs
from tests.reference_model import Checkpoint, reference_thinker
from tests.tiny_conversations import image_bytes, sound_bytes, write_calibration_data, write_video

TEXT_PROMPT = list(range(20, 60))
ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True}
# Only the first step of requests, in every layer: a job's capture has the same calls.
COUNTING: dict[str, Any] = {"morphoquant": {"watch_escapes": {"every": 1_000_000, "layers": 1_000}}}
SERVER_ARGUMENTS = (
    "--dtype=float32",
    "--max-model-len=1024",
    "--max-num-seqs=4",
    '--limit-mm-per-prompt={"image":2,"audio":1,"video":1}',
    "--enforce-eager",
    "--quantization=morphoquant",
    # A model of random weights would write blanks for ever.
    '--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}',
    '--additional-config={"morphoquant":{"watch_escapes":{"every":1,"layers":3,"seconds":0.5}}}',
)


def command(name: str) -> str:
    """Path of a console script of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def calibrate(model: Path, data: Path, output: Path, *arguments: str) -> Path:
    """Make a checkpoint with the console command, as a user would."""
    line = [command("morphoquant"), "calibrate", str(model), "--data", str(data), "--output", str(output), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def omni_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_tiny_omni(tmp_path_factory.mktemp("omni") / "source")


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_tiny_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="session")
def omni_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def omni_checkpoint(omni_source: Path, omni_data: Path) -> Path:
    """Calibrated on text, image, audio and video."""
    return calibrate(omni_source, omni_data, omni_source.with_name("checkpoint"))


@pytest.fixture(scope="session")
def tp1_checkpoint(omni_source: Path, omni_data: Path) -> Path:
    """The same model, made for tensor-parallel size 1 only."""
    return calibrate(omni_source, omni_data, omni_source.with_name("tp1"), "--tensor-parallel", "1")


@pytest.fixture(scope="session")
def checkpoint(omni_checkpoint: Path) -> Checkpoint:
    return Checkpoint(omni_checkpoint)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image and a sound that calibration did not see."""
    directory = tmp_path_factory.mktemp("media")
    files = {"image": directory / "image.png", "audio": directory / "sound.wav"}
    files["image"].write_bytes(image_bytes(11))
    files["audio"].write_bytes(sound_bytes(12))
    return files


def media_messages(image_url: str, audio: str) -> list[dict[str, Any]]:
    """A question about an image (a data: URL) and a sound (base64), in OpenAI's form."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": image_url}},
                {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}},
                {"type": "text", "text": "Say what the sound is, and what the picture is."},
            ],
        }
    ]


@pytest.fixture(scope="session")
def media_text(omni_source: Path) -> str:
    """The question of `media_messages`, rendered by the model's chat template."""
    content = [
        {"type": "image"},
        {"type": "audio"},
        {"type": "text", "text": media_messages("", "")[0]["content"][2]["text"]},
    ]
    processor = AutoProcessor.from_pretrained(omni_source)
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


class Engines:
    """Results of the driver's jobs, by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, jobs: dict[str, dict[str, Any]], timeout: float = 540) -> None:
        """Run jobs in one process; their results join `results`."""
        lines = [{**job, "output": str(self.directory / f"{name}.json")} for name, job in jobs.items()]
        job_file = self.directory / "jobs.json"
        job_file.write_text(json.dumps(lines))
        log = self.directory / "engines.log"
        with log.open("ab") as output:
            done = subprocess.run(
                [sys.executable, "-m", "tests.engine.driver", str(job_file)],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env={**os.environ, **cores_of_ranks()},
            )
        assert done.returncode == 0, "\n".join(log.read_text().splitlines()[-60:])
        for name, line in zip(jobs, lines, strict=True):
            self.results[name] = json.loads(Path(line["output"]).read_text())
            if "capture" in line:
                self.results[name]["captured"] = load_file(line["capture"])


@pytest.fixture(scope="session")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
    omni_checkpoint: Path,
    tp1_checkpoint: Path,
    llama_source: Path,
    media: dict[str, Path],
    media_text: str,
) -> Engines:
    """Every engine that the default tests need, started once, one after another."""
    directory = tmp_path_factory.mktemp("engines")
    text = {"prompt_token_ids": TEXT_PROMPT}
    question = {"prompt": media_text, **{kind: str(path) for kind, path in media.items()}}
    omni = {"model": str(omni_checkpoint), "prompts": [text, question], "engine": ENGINE}
    started = Engines(directory)
    started.run(
        {
            "plain": {"model": str(llama_source), "prompts": [text], "engine": ENGINE},
            "eager": {
                **omni,
                "engine": {**ENGINE, "additional_config": COUNTING},
                "capture": str(directory / "eager.safetensors"),
            },
            "compiled": {**omni, "engine": {**ENGINE, "enforce_eager": False, "additional_config": COUNTING}},
            "tp2": {**omni, "engine": {**ENGINE, "tensor_parallel_size": 2}},
            "bfloat16": {
                **omni,
                "engine": {**ENGINE, "dtype": "bfloat16", "additional_config": COUNTING},
                "capture": str(directory / "bfloat16.safetensors"),
            },
            "float16": {
                **omni,
                "engine": {**ENGINE, "dtype": "float16"},
                "capture": str(directory / "float16.safetensors"),
            },
            "flag on a plain model": {
                "model": str(llama_source),
                "prompts": [],
                "engine": {**ENGINE, "quantization": "morphoquant"},
            },
            "tp2 of a tp1 checkpoint": {
                "model": str(tp1_checkpoint),
                "prompts": [],
                "engine": {**ENGINE, "tensor_parallel_size": 2},
            },
        }
    )
    return started


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


@pytest.fixture(scope="session")
def by_modality(omni_source: Path, rows_checkpoint: Path, prompts: list[dict[str, Any]]) -> torch.Tensor:
    model = reference_thinker(omni_source, Checkpoint(rows_checkpoint))
    return reference_logprobs(model, omni_source, prompts[QUESTION])


@pytest.fixture(scope="session")
def by_any(omni_source: Path, rows_checkpoint: Path, prompts: list[dict[str, Any]]) -> torch.Tensor:
    model = reference_thinker(omni_source, Checkpoint(rows_checkpoint), by_modality=False)
    return reference_logprobs(model, omni_source, prompts[QUESTION])


@pytest.fixture(scope="session")
def server(omni_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve` on the omni checkpoint, started once for every test that asks it."""
    with serve(omni_checkpoint, tmp_path_factory.mktemp("serve") / "serve.log", SERVER_ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.openai_url, api_key="none", timeout=120, max_retries=0)
