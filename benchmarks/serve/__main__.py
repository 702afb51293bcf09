"""python -m benchmarks.serve: whole engines with vLLM's own benchmarks, MorphoQuant against the peers that run here."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import one_line_errors
from benchmarks.models.shapes import MODELS, sixteen_bit_bytes

if TYPE_CHECKING:
    from benchmarks.serve.engine import Settings

# Ways to serve: the format of the checkpoint, and further settings of vLLM.
HEAD_8_BIT = ("--additional-config", json.dumps({"morphoquant": {"lm_head": "int8"}}))
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("bf16", ()),
    "gptq": ("gptq", ()),
    "w8a8": ("w8a8", ()),
    "fp8": ("fp8", ()),
    "nvfp4": ("nvfp4", ()),
    "morphoquant-g32": ("morphoquant-g32", ()),
    "morphoquant-g32-two-level": ("morphoquant-g32-two-level", ()),
    "morphoquant-g64": ("morphoquant-g64", ()),
    "morphoquant-g128": ("morphoquant-g128", ()),
    "morphoquant-g32-head8": ("morphoquant-g32", HEAD_8_BIT),
}
# Bytes that an engine needs in addition to its weights, a repacked copy of them and its cache.
PROCESS_BYTES = 2 << 30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    top.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["Qwen2.5-0.5B", "Qwen2.5-1.5B"])
    default = ["bf16", "gptq", "w8a8", "morphoquant-g32"]
    top.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=default)
    top.add_argument("--rounds", type=int, default=3, help="each starts every engine once")
    top.add_argument("--prompt-tokens", type=int, default=512)
    top.add_argument("--prompts", type=int, default=8, help="long prompts, for each round")
    top.add_argument("--output-tokens", type=int, default=128, help="that are decoded for each sequence")
    top.add_argument("--sequences", nargs="+", type=int, default=[1, 8], help="decoded at once")
    top.add_argument("--threads", type=int, help="on a CPU; all cores by default")
    top.add_argument("--eager", action="store_true", help="as `vllm serve --enforce-eager`")
    top.add_argument("--no-throughput", action="store_true", help="leave `vllm bench throughput` out")
    top.add_argument("--work", type=Path, default=Path(".cache/serve"), help="folder of checkpoints and logs")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/serve"))
    top.add_argument("--name", default="serve", help="of the files")
    top.add_argument("--report", action="store_true", help="write a kept result's summary and plot again")
    return top


def thread_settings(threads: int | None, cores: list[int], environment: Mapping[str, str]) -> dict[str, str]:
    """vLLM's variable that binds its threads to cores, unless the user has set it. MorphoQuantError for too many."""
    from morphoquant_vllm.errors import MorphoQuantError

    if threads is None and "VLLM_CPU_OMP_THREADS_BIND" in environment:
        return {"VLLM_CPU_OMP_THREADS_BIND": environment["VLLM_CPU_OMP_THREADS_BIND"]}
    wanted = len(cores) if threads is None else threads
    if not 1 <= wanted <= len(cores):
        raise MorphoQuantError(f"--threads {wanted}: this process may use {len(cores)} cores; give 1 to {len(cores)}")
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[:wanted]))}


def too_large(model: str, method: str, on_gpu: bool, available: int) -> str | None:
    """Why a model is not tried on a machine with `available` bytes, or None: vLLM keeps repacked 16-bit weights too."""
    if on_gpu or METHODS[method][0] != "bf16":
        return None
    needed = 2 * sixteen_bit_bytes(model) + PROCESS_BYTES
    if needed <= available:
        return None
    return f"needs about {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available"


def too_large_methods(model: str, methods: list[str], on_gpu: bool) -> dict[str, str]:
    """Why methods are not tried for a model on this machine, by method; each reason is printed."""
    from benchmarks.serve import memory

    left_out: dict[str, str] = {}
    for method in methods:
        if reason := too_large(model, method, on_gpu, memory.available()):
            left_out[method] = reason
            print(f"{model} {method}: left out: {reason}", flush=True)
    return left_out


def measure_model(
    model: str,
    methods: list[str],
    rounds: int,
    run: Callable[[str], dict[str, Any]],
    left_out: dict[str, str],
    after_round: Callable[[list[dict[str, dict[str, Any]]]], None],
) -> None:
    """Run every method once in each round, in random order; one that fails is left out from then on, with its reason.

    `run` measures a method or raises RunError; `after_round` gets the rounds so far.
    """
    from benchmarks.serve.engine import RunError

    shuffle = random.Random(0)
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        order = [method for method in methods if method not in left_out]
        shuffle.shuffle(order)
        samples: dict[str, dict[str, Any]] = {}
        for method in order:
            try:
                samples[method] = run(method)
            except RunError as error:
                left_out[method] = str(error)
                print(f"{model} {method}: left out: {error}", flush=True)
                continue
            print(f"{model} {method}, round {number + 1}: {_line(samples[method])}", flush=True)
        # The table's order is the command's.
        found.append({method: samples[method] for method in methods if method in samples})
        after_round(found)


def _line(samples: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in samples.items() if isinstance(value, int | float))


def backend(on_gpu: bool) -> str:
    """The backend of MorphoQuant's linears on this machine, in words."""
    import torch

    from morphoquant_vllm import backends

    if on_gpu:
        return f"the Triton kernels on {torch.cuda.get_device_name()}"
    instructions = backends.BACKENDS[backends.select_backend(torch.device("cpu"))].instructions()
    return f"the CPU kernels, {instructions}" if instructions else "the torch reference"


def settings_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """What is measured, by the command line."""
    from benchmarks.serve.engine import Settings

    return Settings(
        prompt_tokens=arguments.prompt_tokens,
        prompts=arguments.prompts,
        output_tokens=arguments.output_tokens,
        sequences=tuple(arguments.sequences),
        throughput=not arguments.no_throughput,
        arguments=("--enforce-eager",) if arguments.eager else (),
        environment=tuple(environment.items()),
    )


def run(arguments: argparse.Namespace, command: str) -> list[Path]:
    """Measure; write the files after every round, so an interrupted run keeps its measurements."""
    import torch

    from benchmarks.common.files import weight_bytes
    from benchmarks.common.machine import load, machine, versions
    from benchmarks.serve.checkpoints import write_checkpoint
    from benchmarks.serve.engine import measure
    from benchmarks.serve.report import write
    from benchmarks.serve.summary import summarize

    on_gpu = torch.cuda.is_available()
    environment = {} if on_gpu else thread_settings(arguments.threads, sorted(os.sched_getaffinity(0)), os.environ)
    settings = settings_of(arguments, environment)
    busy = load()
    started = time.monotonic()
    summary: dict[str, Any] = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "backend": backend(on_gpu),
        "environment": environment,
        **busy,
        "rounds": arguments.rounds,
        "seconds": 0.0,
        "models": {},
    }
    paths: list[Path] = []
    for model in arguments.models:
        left_out = too_large_methods(model, arguments.methods, on_gpu)
        entry: dict[str, Any] = {"methods": {}, "samples": [], "checkpoint_bytes": {}, "left_out": left_out}
        summary["models"][model] = entry

        def measured(method: str, model: str = model, entry: dict[str, Any] = entry) -> dict[str, Any]:
            kind, extra = METHODS[method]
            checkpoint = write_checkpoint(model, kind, arguments.work)
            entry["checkpoint_bytes"][method] = weight_bytes(checkpoint)
            return measure(checkpoint, settings, extra, arguments.work / "logs" / f"{model}-{method}")

        def keep(rounds: list[dict[str, dict[str, Any]]], entry: dict[str, Any] = entry) -> None:
            entry["samples"], entry["methods"] = rounds, summarize(rounds)
            summary["seconds"] = time.monotonic() - started
            paths[:] = write(summary, arguments.results, arguments.name)

        measure_model(model, arguments.methods, arguments.rounds, measured, left_out, keep)
    return paths


def main() -> None:
    """Measure, write the files, print their paths."""
    from benchmarks.common.files import read_result
    from benchmarks.common.server import exit_on_signals
    from benchmarks.serve.report import write

    arguments = parser().parse_args()
    exit_on_signals()
    with one_line_errors():
        if arguments.report:
            paths = write(read_result(arguments.results, arguments.name), arguments.results, arguments.name)
        else:
            paths = run(arguments, "python -m benchmarks.serve " + shlex.join(sys.argv[1:]))
        for path in paths:
            print(path)


if __name__ == "__main__":
    main()
