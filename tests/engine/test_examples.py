"""The scripts of examples/ that need an engine, on the tiny omni checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from openai import OpenAI
from PIL import Image
from transformers import AutoProcessor

from benchmarks.common.server import Server
from tests.engine.conftest import media_messages
from tests.engine.rows import REPOSITORY
from tests.harness import TASKS
from tests.tiny_conversations import sound

pytestmark = pytest.mark.full


def run(name: str, *arguments: str | Path, stdin: str = "", **environment: str) -> str:
    """The output of an example, run in a process of its own as a user would."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offline_inference_reads_the_image_and_the_sound(
    omni_source: Path, omni_checkpoint: Path, media: dict[str, Path], media_text: str
) -> None:
    question = media_messages("", "")[0]["content"][2]["text"]
    arguments = ("--question", question, "--max-tokens", "8", "--max-model-len", "1024", "--eager")
    output = run("offline_image_and_sound.py", omni_checkpoint, media["image"], media["audio"], *arguments)
    read, written = re.search(r"^\((\d+) tokens read, (\d+) written\)$", output, re.MULTILINE).groups()
    inputs = AutoProcessor.from_pretrained(omni_source)(
        text=[media_text],
        images=[Image.open(media["image"]).convert("RGB")],
        audio=[soundfile.read(media["audio"], dtype="float32")[0]],
        return_tensors="pt",
    )
    assert int(read) == inputs["input_ids"].numel() and written == "8"


def test_the_chat_client_streams_the_servers_answers(
    server: Server, client: OpenAI, media: dict[str, Path], tmp_path: Path
) -> None:
    recording = tmp_path / "recording.mp3"
    soundfile.write(recording, np.stack([sound(14)] * 2, 1), 44100, format="MP3")
    arguments = ("--sound", recording, "--image", media["image"], "--base-url", server.openai_url, "--max-tokens", "6")
    before = prompt_tokens(client)
    run("streaming_chat.py", *arguments, stdin="What can you hear?\n")
    first = prompt_tokens(client) - before
    output = run("streaming_chat.py", *arguments, stdin="What can you hear?\nAnd in one short sentence?\n")
    both = prompt_tokens(client) - before - first
    assert len(output) > 2
    # The second question carries the first one, its media and its answer.
    assert first > 50 and both > 2 * first


def prompt_tokens(client: OpenAI) -> int:
    """Tokens of all prompts that the server has read."""
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    return sum(int(float(value)) for value in re.findall(r"^vllm:prompt_tokens_total\{.*\} (\S+)$", text, re.MULTILINE))


def test_lm_eval_scores_a_server_and_a_loaded_model_alike(
    server: Server, omni_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ("--tasks", ",".join(TASKS), "--include-path", "tests/data/lm_eval", "--limit", "3")
    environment = {"HF_DATASETS_CACHE": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    served = run("lm_eval_checkpoint.py", omni_checkpoint, *arguments, "--base-url", server.openai_url, **environment)
    loaded = run("lm_eval_checkpoint.py", omni_checkpoint, *arguments, **environment)
    scores = scores_of(served)
    assert set(scores) == {"acc", "exact_match"}
    assert scores_of(loaded) == scores


def scores_of(output: str) -> dict[str, float]:
    """The scores of lm-eval's table by the names of their metrics."""
    rows = [[cell.strip() for cell in line.split("|")] for line in output.splitlines() if line.startswith("|")]
    return {row[5]: float(row[7]) for row in rows if row[5] in ("acc", "exact_match")}


def test_a_checkpoint_is_compared_with_its_source(omni_source: Path, omni_checkpoint: Path, omni_data: Path) -> None:
    output = run("compare_checkpoints.py", omni_source, omni_checkpoint, "--data", omni_data, "--most", "100")
    assert [line.split()[0] for line in output.splitlines()] == ["all", "text", "image", "video", "audio", "largest"]
    divergences = [float(value) for value in re.findall(r" KL (\S+)", output)]
    assert len(divergences) == 5 and min(divergences) > 0
