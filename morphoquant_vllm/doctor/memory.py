"""A checkpoint's need against this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from morphoquant_vllm import environment
from morphoquant_vllm.doctor.finding import Finding, note, ok, problem

# While vLLM loads on a CPU, weights take up to 1.05 times their files (morphoquant_vllm.host_memory).
LOADING = 1.05
# Processes of vLLM's server and engine without a model, with torch and transformers imported: about 1 GiB each.
PROCESSES = 2 << 30
MEMINFO = Path("/proc/meminfo")
# vLLM on a CPU does not start unless so much of the memory is free, or the cache's size is given.
WANTED = 0.92
# GiB that serve some conversations of a 7B model.
ENOUGH = 4


@dataclass(frozen=True)
class Model:
    """A model directory: bytes of weights, media, whether it is a MorphoQuant checkpoint, layers with 8-bit weights."""

    directory: Path
    weights: int
    media: frozenset[str]
    is_quantized: bool
    eight_bit: int = 0


def read_model(directory: Path) -> Model:
    """The sizes of a model directory, from its headers. Raises MorphoQuantError if it cannot be read."""
    # Imported here: they import torch, and a doctor runs without it.
    from morphoquant_vllm.format.checkpoint import CONFIG_FILE, read_index, read_spec
    from morphoquant_vllm.format.files import read_json
    from morphoquant_vllm.format.schema import QUANT_METHOD

    settings = read_json(directory / CONFIG_FILE).get("quantization_config")
    # Of another method, as FP8, it is a source of calibration.
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        return Model(
            directory, sum(path.stat().st_size for path in directory.glob("*.safetensors")), frozenset(), False
        )
    spec = read_spec(directory)
    files = set(read_index(directory).values())
    weights = sum((directory / name).stat().st_size for name in files)
    eight_bit = sum(layer.weight_bits == 8 for layer in spec.layers.values())
    return Model(directory, weights, frozenset(spec.placeholder_token_ids), True, eight_bit)


def cpu_memory(meminfo: Path = MEMINFO, groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """All bytes on the CPU and the free ones: the system's, or those of a container's limit."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit, used = groups / "memory.max", groups / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        total, free = min(total, int(text)), min(free, max(0, int(text) - int(used.read_text())))
    return total, free


def kv_cache() -> Iterator[Finding]:
    """Whether vLLM starts on this CPU without being told the size of its cache of keys and values."""
    if not MEMINFO.exists():
        return  # not Linux
    total, free = cpu_memory()
    if not environment.kv_cache_space_is_legal():
        text = f"{environment.KV_CACHE} is no whole number of GiB, and vLLM does not start with it"
        yield problem("kv-cache", text, f"set it to {ENOUGH}, or unset it")
    elif space := environment.kv_cache_space():
        yield ok("kv-cache", f"{space} GiB ({environment.KV_CACHE})")
    elif free < WANTED * total:
        text = f"`vllm serve` takes {WANTED:.0%} of the memory for itself, but {free / total:.0%} is free"
        space = str(min(ENOUGH, max(1, (free - PROCESSES) >> 31)))
        yield note("kv-cache", text, f"{environment.KV_CACHE}={space} vllm serve ... gives it {space} GiB instead")
    else:
        yield ok("kv-cache", f"vLLM takes {WANTED:.0%} of the memory, unless {environment.KV_CACHE} gives it less")


def weight_bits(model: Model, *, has_gpu: bool) -> Iterator[Finding]:
    """Whether the kernels of this machine serve the model's 8-bit weights; nothing if it has none."""
    if not model.eight_bit:
        return
    text = f"8-bit weights in {model.eight_bit} layers"
    if has_gpu:
        remedy = "serve on a CPU, or calibrate again without bits_budget"
        yield problem("bits", f"{text} are not served on GPUs yet", remedy)
    else:
        yield ok("bits", f"{text}, served on CPUs")


def serving(model: Model, gpu_bytes: int | None, gpus: int = 1) -> Iterator[Finding]:
    """Whether the weights of `model` fit; `gpu_bytes` is the memory of each of the `gpus`, None without one."""
    need = round(model.weights * (1 if gpu_bytes is not None else LOADING)) + (
        0 if gpu_bytes is not None else PROCESSES
    )
    have = cpu_memory()[1] if gpu_bytes is None else gpu_bytes
    place = "free on the CPU" if gpu_bytes is None else "on the GPU"
    text = f"{os.path.basename(os.path.realpath(model.directory))} takes {need / 2**30:.2f} GiB"
    rest = f"{have / 2**30:.2f} GiB are {place}"
    if need > have and gpu_bytes is not None and need <= gpus * have:
        ranks = next(size for size in range(2, gpus + 1) if need <= size * have)
        yield note("memory", f"{text}, but {rest}", f"serve with --tensor-parallel-size {ranks} or more")
    elif need > have and not model.is_quantized:
        # Calibration reads one block at a time.
        yield note("memory", f"{text}, but {rest}", "this machine cannot serve it in 16 bit; its checkpoint is smaller")
    elif need > have:
        yield problem("memory", f"{text}, but {rest}", "free memory, or serve on a larger machine")
    else:
        yield ok("memory", f"{text} of weights and processes; {rest}, the rest is for the KV cache")
