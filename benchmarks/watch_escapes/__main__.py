"""python -m benchmarks.watch_escapes DIR: the time that counting escapes adds to an engine step."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.command import one_line_errors
from benchmarks.common.machine import load, machine


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.watch_escapes", description=__doc__)
    top.add_argument("directory", type=Path, metavar="DIR", help="a MorphoQuant checkpoint")
    top.add_argument("--layers", type=int, default=8, help="that are counted")
    top.add_argument("--steps", type=int, default=100, help="of each kind, half of them counted")
    top.add_argument("--prompt-tokens", type=int, default=512)
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/watch_escapes"))
    top.add_argument("--name", help="of the file (default: DIR's)")
    return top


@contextmanager
def timed_steps(watch: Any, found: dict[int, dict[str, list[float]]]) -> Iterator[None]:
    """Note the CPU seconds of each step by its tokens, counted and not; the watch counts every second one.

    They are of all threads together. Programs beside it disturb them less than the time of a clock."""
    step = watch.step

    @contextmanager
    def timed(tokens: int) -> Iterator[None]:
        kind = "not counted" if watch.steps % 2 else "counted"
        started = time.process_time()
        with step(tokens):
            yield
        if tokens:
            times = found.setdefault(tokens, {"counted": [], "not counted": []})
            times[kind].append(time.process_time() - started)

    watch.step = timed
    try:
        yield
    finally:
        watch.step = step


def summarize(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median CPU milliseconds of both kinds of steps, and the median difference of neighbouring steps."""
    pairs = zip(times["counted"], times["not counted"], strict=False)
    return {
        "counted_ms": 1000 * median(times["counted"]),
        "not_counted_ms": 1000 * median(times["not counted"]),
        "difference_ms": 1000 * median(counted - other for counted, other in pairs),
        "steps": len(times["counted"]) + len(times["not counted"]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the steps of one engine: decoding one and eight sequences, and prompts one at a time."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    length = arguments.prompt_tokens
    longest = max(length + 1, arguments.steps + 16)
    settings = {"every": 2, "layers": arguments.layers, "seconds": 3600}
    llm = LLM(
        str(arguments.directory),
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=max(longest, 128),
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={"morphoquant": {"watch_escapes": settings}},
    )
    watch = llm.llm_engine.model_executor.driver_worker.vllm_config.quant_config.escape_watch

    def ask(sequences: int, tokens: int, output: int) -> None:
        prompts = [
            {"prompt_token_ids": [5 + (index + other) % 90 for index in range(tokens)]} for other in range(sequences)
        ]
        llm.generate(prompts, SamplingParams(max_tokens=output, temperature=0, ignore_eos=True), use_tqdm=False)

    ask(8, 8, 4)
    found: dict[int, dict[str, list[float]]] = {}
    with timed_steps(watch, found):
        for sequences in (1, 8):
            ask(sequences, 8, arguments.steps + 1)
        for _ in range(arguments.steps // 4):
            ask(1, length, 1)
    kinds = {1: "decode, 1 sequence", 8: "decode, 8 sequences", length: f"prompt of {length} tokens"}
    return {"layers": len(watch.layers), "steps": {name: summarize(found[tokens]) for tokens, name in kinds.items()}}


def main() -> None:
    """Measure, write the file, print it in short."""
    arguments = parser().parse_args()
    with one_line_errors():
        command = "python -m benchmarks.watch_escapes " + shlex.join(sys.argv[1:])
        result = {"command": command, "machine": machine(), **load(), "counted_layers": arguments.layers}
        result |= measure(arguments)
        for name, entry in result["steps"].items():
            print(
                f"{name}: counted {entry['counted_ms']:.2f} ms, not {entry['not_counted_ms']:.2f} ms, "
                f"difference {entry['difference_ms']:.3f} ms ({entry['steps']} steps)"
            )
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / f"{arguments.name or arguments.directory.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
