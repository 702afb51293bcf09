"""A checkpoint's need against this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from morphoquant_vllm.doctor.finding import Finding, ok, problem

# While vLLM loads on a CPU, weights take up to 1.05 times their files (morphoquant_vllm.host_memory).
LOADING = 1.05
# Processes of vLLM's server and engine without a model, with torch and transformers imported: about 1 GiB each.
PROCESSES = 2 << 30


@dataclass(frozen=True)
class Model:
    """A model directory: its weights in bytes, the media that it takes, and whether it is a MorphoQuant checkpoint."""

    directory: Path
    weights: int
    media: frozenset[str]
    is_quantized: bool


def read_model(directory: Path) -> Model:
    """The sizes of a model directory, from its headers. Raises MorphoQuantError if it cannot be read."""
    # Imported here: they import torch, and a doctor runs without it.
    from morphoquant_vllm.format.checkpoint import CONFIG_FILE, read_index, read_spec
    from morphoquant_vllm.format.files import read_json

    config = read_json(directory / CONFIG_FILE)
    if "quantization_config" not in config:
        return Model(
            directory, sum(path.stat().st_size for path in directory.glob("*.safetensors")), frozenset(), False
        )
    spec = read_spec(directory)
    files = set(read_index(directory).values())
    weights = sum((directory / name).stat().st_size for name in files)
    return Model(directory, weights, frozenset(spec.placeholder_token_ids), True)


def available_memory(meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free bytes on the CPU: the system's, or those that remain of a container's limit."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit, used = groups / "memory.max", groups / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def serving(model: Model, gpu_bytes: int | None) -> Iterator[Finding]:
    """Whether the weights of `model` fit; `gpu_bytes` is the memory of the GPU, None without one."""
    need = round(model.weights * (1 if gpu_bytes is not None else LOADING)) + (
        0 if gpu_bytes is not None else PROCESSES
    )
    have = available_memory() if gpu_bytes is None else gpu_bytes
    place = "free on the CPU" if gpu_bytes is None else "on the GPU"
    text = f"{os.path.basename(os.path.realpath(model.directory))} takes {need / 2**30:.2f} GiB"
    rest = f"{have / 2**30:.2f} GiB are {place}"
    if need > have:
        yield problem("memory", f"{text}, but {rest}", "free memory, or serve on a larger machine")
    else:
        yield ok("memory", f"{text} of weights and processes; {rest}, the rest is for the KV cache")
