"""`vllm serve` on a calibrated checkpoint, asked through the openai client."""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from openai import OpenAI
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

from benchmarks.common.server import Server, ServerError, serve
from tests.engine.agreement import TIED_TOLERANCE, assert_same_logprobs
from tests.engine.conftest import TEXT_PROMPT, media_messages
from tests.reference_model import Checkpoint, reference_thinker
from tests.tiny_conversations import sound

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(omni_source: Path, checkpoint: Checkpoint) -> nn.Module:
    return reference_thinker(omni_source, checkpoint)


def reference_logprobs(model: nn.Module, inputs: dict[str, Tensor], generated: list[int]) -> Tensor:
    """Log probabilities [len(generated), vocabulary] of each generated position, given the prompt in `inputs`."""
    tail = torch.tensor([generated])
    extended = {**inputs, "input_ids": torch.cat((inputs["input_ids"], tail), 1)}
    extended["attention_mask"] = torch.ones_like(extended["input_ids"])
    with torch.no_grad():
        logits = model(**extended).logits[0]
    return logits.log_softmax(-1)[-len(generated) - 1 : -1]


def assert_agrees(expected: Tensor, tokens: list[int], logprobs: list[float]) -> None:
    """Every served logprob within the tolerance, every greedy token the reference's where that is decided."""
    chosen = expected.gather(1, torch.tensor(tokens)[:, None]).flatten()
    assert_same_logprobs(torch.tensor(logprobs), chosen)
    top = expected.topk(2).values
    decided = top[:, 0] - top[:, 1] > TIED_TOLERANCE
    assert bool(decided.any()), "a test in which no token is decided proves nothing"
    assert bool((expected.argmax(-1) == torch.tensor(tokens))[decided].all())


def token_ids(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


def test_text_agrees_with_the_reference_model(client: OpenAI, reference: nn.Module) -> None:
    name = client.models.list().data[0].id
    answer = client.completions.create(
        model=name, prompt=TEXT_PROMPT, max_tokens=8, temperature=0, logprobs=1, extra_body={"return_token_ids": True}
    )
    tokens = token_ids(answer.choices[0])
    assert len(tokens) == 8
    inputs = {"input_ids": torch.tensor([TEXT_PROMPT])}
    assert_agrees(reference_logprobs(reference, inputs, tokens), tokens, answer.choices[0].logprobs.token_logprobs)


def test_the_page_of_metrics_has_the_escapes_of_each_row(
    client: OpenAI, server: Server, checkpoint: Checkpoint
) -> None:
    name = client.models.list().data[0].id

    def counted() -> dict[str, float]:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as page:
            lines = [line.split() for line in page.read().decode().splitlines() if line.startswith("morphoquant:")]
        return {metric: float(value) for metric, value in lines}

    # Counts of earlier requests arrive with a delay.
    before = -1.0
    while before != (before := counted().get('morphoquant:counted_inputs_total{row="text"}', 0.0)):
        time.sleep(2)
    client.completions.create(model=name, prompt=TEXT_PROMPT, max_tokens=4, temperature=0)
    # Three layers count the prompt, and all new tokens but the last.
    expected = before + 3 * (len(TEXT_PROMPT) + 3)
    deadline = time.monotonic() + 20
    while (found := counted()).get('morphoquant:counted_inputs_total{row="text"}', 0.0) < expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert found['morphoquant:counted_inputs_total{row="text"}'] == expected
    rate = found['morphoquant:counted_escapes_total{row="text"}'] / found['morphoquant:counted_codes_total{row="text"}']
    assert 0 < rate < 0.2
    assert 0 < found['morphoquant:calibrated_escape_rate{row="text"}'] < 0.05
    log = server.log.read_text()
    assert "MorphoQuant: escapes are counted in one step of every 1, in 3 of 8 layers" in log
    assert "MorphoQuant: escapes: text " in log


def test_image_and_audio_agree_with_the_reference_model(
    client: OpenAI, reference: nn.Module, omni_source: Path, media: dict[str, Path], media_text: str
) -> None:
    image, sound = (base64.b64encode(media[kind].read_bytes()).decode() for kind in ("image", "audio"))
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=media_messages(f"data:image/png;base64,{image}", sound),
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    choice = answer.choices[0]
    tokens = token_ids(choice)
    assert len(tokens) == 8 and choice.message.content
    inputs = AutoProcessor.from_pretrained(omni_source)(
        text=[media_text],
        images=[Image.open(media["image"]).convert("RGB")],
        audio=[soundfile.read(media["audio"], dtype="float32")[0]],
        return_tensors="pt",
    )
    assert answer.model_extra["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    expected = reference_logprobs(reference, dict(inputs), tokens)
    assert_agrees(expected, tokens, [entry.logprob for entry in choice.logprobs.content])


@pytest.mark.parametrize(("rate", "channels", "container"), [(8000, 1, "wav"), (44100, 1, "mp3"), (48000, 2, "flac")])
def test_sound_of_another_rate_is_answered(client: OpenAI, rate: int, channels: int, container: str) -> None:
    """vLLM resamples it to 16 kHz, by a package that need not load on a CPU."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([sound(13)[:rate]] * channels, 1), rate, format=container)
    data = base64.b64encode(buffer.getvalue()).decode()
    # OpenAI's input_audio knows wav and mp3 alone.
    part = (
        {"type": "audio_url", "audio_url": {"url": f"data:audio/{container};base64,{data}"}}
        if container == "flac"
        else {"type": "input_audio", "input_audio": {"data": data, "format": container}}
    )
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [part]}],
        max_tokens=4,
        temperature=0,
    )
    assert answer.choices[0].message.content and answer.usage.completion_tokens == 4


def test_the_log_is_free_of_warnings_of_ours(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "morphoquant" in line.lower()]
    assert lines, "vLLM names the method when it starts"
    assert not [line for line in lines if "WARNING" in line or "ERROR" in line]


def test_a_damaged_checkpoint_is_refused_before_it_is_loaded(omni_checkpoint: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(omni_checkpoint, tmp_path / "damaged")
    (file,) = damaged.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with (
        pytest.raises(ServerError) as refusal,
        serve(damaged, tmp_path / "serve.log", ("--dtype=float32", "--max-model-len=1024", "--enforce-eager")),
    ):
        pass
    assert "exited with 1" in str(refusal.value)
    last = (tmp_path / "serve.log").read_text().strip().splitlines()[-1]
    assert last.split("MorphoQuantError: ")[1].startswith(f"{file}: truncated or not safetensors")


def test_what_a_worker_refuses_is_said_again_at_the_end(
    tp1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own end is "Engine core initialization failed"; only Python's tracker of shared memory may come later."""
    # Two workers on a machine with one NUMA node need their cores named.
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    arguments = ("--dtype=float32", "--max-model-len=1024", "--enforce-eager", "--tensor-parallel-size=2")
    with pytest.raises(ServerError), serve(tp1_checkpoint, tmp_path / "serve.log", arguments):
        pass
    lines = (tmp_path / "serve.log").read_text().strip().splitlines()
    last = [line for line in lines if "resource_tracker" not in line][-1]
    assert last.startswith("MorphoQuantError: ") and "tensor parallel size 2 breaks a group" in last
