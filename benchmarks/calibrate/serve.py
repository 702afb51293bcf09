"""Loads a checkpoint of real size in vLLM and asks it one question with an image and a sound."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path
from typing import Any

import openai

from benchmarks.calibrate.data import image_bytes, sound_bytes
from benchmarks.calibrate.memory import MemoryWatch
from benchmarks.calibrate.model.layouts import GENERATED_FILE
from benchmarks.common.files import weight_bytes
from benchmarks.common.server import serve
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE

ARGUMENTS = (
    "--max-model-len=2048",
    "--max-num-seqs=1",
    '--limit-mm-per-prompt={"image":1,"audio":1,"video":0}',
    # An image of the published processor's largest size would be profiled else: 16384 tokens.
    '--mm-processor-kwargs={"max_pixels":401408}',
    "--skip-mm-profiling",
    "--enforce-eager",
)


def note_origin(model: Path, checkpoint: Path) -> None:
    """Copy the generated model's description into its checkpoint, if both exist: calibration does not carry it."""
    if (model / GENERATED_FILE).is_file() and checkpoint.is_dir():
        shutil.copyfile(model / GENERATED_FILE, checkpoint / GENERATED_FILE)


def describe(checkpoint: Path) -> dict[str, Any]:
    """The origin of a checkpoint: the generated model that it was made of, and its calibration.

    MorphoQuantError if it is not a MorphoQuant checkpoint.
    """
    report = checkpoint / REPORT_FILE
    if not report.is_file():
        raise MorphoQuantError(f"{checkpoint}: no {REPORT_FILE}; give a checkpoint that calibration wrote")
    content = json.loads(report.read_text())
    source = checkpoint / GENERATED_FILE
    settings = ("rounding", "regression", "sample_tokens", "dtype", "group_size")
    return {
        "model": json.loads(source.read_text()) if source.is_file() else "not generated here",
        "settings": {name: content["settings"][name] for name in settings},
        "data": content["data"],
        "bytes": weight_bytes(checkpoint),
    }


def ask(checkpoint: Path, log: Path, *, dtype: str, kv_gib: int, answer_tokens: int, timeout: float) -> dict[str, Any]:
    """Serve the checkpoint, ask, stop; seconds to the first healthy answer, of the request, and the peak of memory."""
    described = describe(checkpoint)
    image, sound = (base64.b64encode(content).decode() for content in (image_bytes(1), sound_bytes(1)))
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "text", "text": "What can you see in this image? What can you hear in this audio?"},
    ]
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with MemoryWatch() as watch:
        environment = {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}
        with serve(
            checkpoint, log, (*ARGUMENTS, f"--dtype={dtype}"), timeout=timeout, environment=environment
        ) as server:
            loaded, loading = time.monotonic() - started, watch.take()
            with openai.OpenAI(base_url=server.openai_url, api_key="none", timeout=timeout, max_retries=0) as client:
                asked = time.monotonic()
                answer = client.chat.completions.create(
                    model=str(checkpoint),
                    messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
                    max_tokens=answer_tokens,
                    temperature=0,
                )
                took = time.monotonic() - asked
    usage = answer.usage
    return {
        "checkpoint": described,
        "arguments": [*ARGUMENTS, f"--dtype={dtype}"],
        "kv_cache_gib": kv_gib,
        "load_seconds": loaded,
        "load_peak": {"resident": loading.resident, "anonymous": loading.anonymous},
        "request_seconds": took,
        "peak": {"resident": watch.peak.resident, "anonymous": watch.peak.anonymous},
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "answer_tokens": usage.completion_tokens if usage else None,
        "answer": answer.choices[0].message.content,
    }


def markdown(result: dict[str, Any]) -> str:
    """The served checkpoint, the times of loading and of the request, and the memory, as Markdown."""
    served = result["checkpoint"]
    gib = 2**30
    return (
        "# One answer from a checkpoint of real size\n\n"
        f"`{result['command']}`. {result['machine']}.\n\n"
        f"Served: generated weights {served['model']}, {served['bytes'] / 1e9:.2f} GB; calibrated with "
        f"{served['settings']} on {served['data']}. Its answers mean nothing: that it loads, takes an image and a "
        "sound, and answers is what is shown.\n\n"
        "| | |\n|---|---|\n"
        f"| loading, until the server answers | {result['load_seconds']:.0f} s |\n"
        f"| peak while loading, resident | {result['load_peak']['resident'] / gib:.2f} GiB |\n"
        f"| without pages of mapped files | {result['load_peak']['anonymous'] / gib:.2f} GiB |\n"
        f"| peak over all, resident | {result['peak']['resident'] / gib:.2f} GiB |\n"
        f"| without pages of mapped files | {result['peak']['anonymous'] / gib:.2f} GiB |\n"
        f"| key-value cache, of it | {result['kv_cache_gib']} GiB |\n"
        f"| request with an image and a sound | {result['prompt_tokens']} tokens in, {result['answer_tokens']} out, "
        f"{result['request_seconds']:.1f} s |\n"
    )
