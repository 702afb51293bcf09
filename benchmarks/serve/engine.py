"""One run of one engine: `vllm bench serve` against `vllm serve`, then `vllm bench throughput`; their figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.server import Server, ServerError, serve, stop
from benchmarks.serve import memory

# A failing engine's last complaints, which follow from an earlier one.
_CONSEQUENCE = (
    *("Engine core initialization failed", "WorkerProc initialization failed", "Worker failed with error"),
    "EngineCore encountered an issue",
)
_ERROR = re.compile(r"\b(\w+(?:Error|Exception)): (.+)")
_KERNEL = re.compile(r"(?:Using|Selected) (\w+Kernel)\b")
_LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")
_DEVICE_MEMORY = re.compile(r"Model loading took ([\d.]+) GiB")


class RunError(RuntimeError):
    """An engine or one of its clients failed; the message is one line that says why."""


@dataclass(frozen=True)
class Settings:
    """The requests to every engine.

    Lengths are in tokens. Prompts: `prompts` (0 for none) of `prompt_tokens` each, for one new token. Decoding: each
    number of `sequences` of prompts at a time, of `short_tokens`, for `output_tokens` new ones each.
    """

    prompt_tokens: int = 512
    prompts: int = 8
    short_tokens: int = 32
    output_tokens: int = 128
    sequences: tuple[int, ...] = (1, 8)
    throughput: bool = True
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    timeout: float = 1800

    def engine_arguments(self) -> list[str]:
        """Arguments of `vllm serve` and `vllm bench throughput`, without a prefix cache: prompts of one seed recur."""
        longest = max(self.prompt_tokens + 1, self.short_tokens + self.output_tokens)
        return [
            *("--dtype", "bfloat16", "--max-model-len", str(-(-longest // 64) * 64 + 64)),
            *("--max-num-seqs", str(max(*self.sequences, self.prompts)), "--no-enable-prefix-caching"),
            *self.arguments,
        ]


def random_prompts(length: int, output: int, count: int) -> list[str]:
    """Arguments that both of vLLM's benchmarks take for `count` random prompts of one length."""
    return [
        *("--dataset-name", "random", "--random-input-len", str(length), "--random-output-len", str(output)),
        *("--num-prompts", str(count), "--num-warmups", "1"),
    ]


def measure(checkpoint: Path, settings: Settings, extra: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Serve a checkpoint once and send all requests; figures by name. Raises RunError.

    decode_tokens_s_N  N sequences / vLLM's median time per output token, the first one left out
    ttft_ms            vLLM's median time to the first token of a long prompt, one at a time
    prompt_tokens_s    tokens of all long prompts / time that `vllm bench throughput` takes for them
    start_s, load_s    until the server answers; vLLM's own figure for reading the weights
    *_bytes            memory.of_session after the requests; on a GPU vLLM's figure for the weights
    """
    scratch.mkdir(parents=True, exist_ok=True)
    arguments = [*settings.engine_arguments(), *extra]
    log = scratch / "serve.log"
    started = time.monotonic()
    try:
        with serve(
            checkpoint, log, arguments, timeout=settings.timeout, environment=dict(settings.environment)
        ) as server:
            found: dict[str, Any] = {"start_s": time.monotonic() - started}
            for count in settings.sequences:
                result = _ask(server, checkpoint, settings, settings.short_tokens, settings.output_tokens, count, count)
                found[f"decode_tokens_s_{count}"] = count * 1000 / result["median_tpot_ms"]
            if settings.prompts:
                result = _ask(server, checkpoint, settings, settings.prompt_tokens, 1, settings.prompts, 1)
                found["ttft_ms"] = result["median_ttft_ms"]
            found |= {f"{name}_bytes": size for name, size in memory.of_session(server.process.pid).items()}
    except ServerError as error:
        raise RunError(_reason(log.read_text(errors="replace"), str(error).split(";")[0])) from error
    found |= read_log(log.read_text(errors="replace"))
    if settings.throughput and settings.prompts:
        found["prompt_tokens_s"] = _throughput(checkpoint, settings, arguments, scratch)
    return found


def _ask(
    server: Server, checkpoint: Path, settings: Settings, length: int, output: int, count: int, at_once: int
) -> dict[str, Any]:
    """The JSON of one `vllm bench serve`. A server that logged an error gives the reason, not the client."""
    file = server.log.with_name("bench-serve.json")
    file.unlink(missing_ok=True)
    command = [
        *("bench", "serve", "--backend", "vllm", "--base-url", server.url, "--model", str(checkpoint)),
        *random_prompts(length, output, count),
        *("--max-concurrency", str(at_once), "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
    ]
    try:
        run_vllm(command, server.log.with_name("bench-serve.log"), settings)
        return served_result(file, count)
    except RunError as error:
        raise RunError(_reason(server.log.read_text(errors="replace"), str(error))) from error


def served_result(file: Path, count: int) -> dict[str, Any]:
    """The JSON that `vllm bench serve` wrote; RunError unless all `count` requests were answered."""
    result: dict[str, Any] = json.loads(file.read_text())
    if result["completed"] != count:
        raise RunError(f"vllm bench serve: {result['completed']} of {count} requests were answered")
    return result


def _throughput(checkpoint: Path, settings: Settings, arguments: Sequence[str], scratch: Path) -> float:
    file = scratch / "bench-throughput.json"
    file.unlink(missing_ok=True)
    command = [
        *("bench", "throughput", "--model", str(checkpoint), "--disable-detokenize"),
        *random_prompts(settings.prompt_tokens, 1, settings.prompts),
        *("--output-json", str(file), *arguments),
    ]
    run_vllm(command, scratch / "bench-throughput.log", settings)
    return prompt_rate(json.loads(file.read_text()))


def prompt_rate(result: dict[str, Any]) -> float:
    """Prompt tokens per second from the JSON of `vllm bench throughput` with one new token for each request."""
    return float((result["total_num_tokens"] - result["num_requests"]) / result["elapsed_time"])


def run_vllm(arguments: Sequence[str], log: Path, settings: Settings) -> None:
    """Run the `vllm` command to its end; RunError with the reason from its output if it fails or takes too long."""
    command = [str(Path(sys.executable).with_name("vllm")), *arguments]
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **dict(settings.environment),
    }
    what = " ".join(arguments[:2])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            code = process.wait(settings.timeout)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"vllm {what} took more than {settings.timeout:.0f} s") from error
        finally:
            stop(process)
    if code:
        raise RunError(_reason(log.read_text(errors="replace"), f"vllm {what} exited with {code}"))


def _reason(log: str, otherwise: str) -> str:
    """The last error in a log that is not the consequence of another, in one line; `otherwise` if there is none."""
    errors = [
        f"{match[1]}: {match[2]}"
        for line in log.splitlines()
        if " WARNING " not in line and (match := _ERROR.search(line))
        if not any(consequence in line for consequence in _CONSEQUENCE)
    ]
    return " ".join((errors[-1] if errors else otherwise).split())[:300]


def read_log(log: str) -> dict[str, Any]:
    """Facts from an engine's log: its kernels, seconds to load its weights, their bytes on a GPU."""
    found: dict[str, Any] = {"kernels": sorted(set(_KERNEL.findall(log)))}
    if loading := _LOADING.search(log):
        found["load_s"] = float(loading[1])
    if device := _DEVICE_MEMORY.search(log):
        found["device_bytes"] = float(device[1]) * 2**30
    if "slow torch reference serves" in log:
        found["kernels"].append("torch reference")
    return found
