"""python -m benchmarks.load_check DIR: measures the time that checking a checkpoint adds to loading it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.command import one_line_errors


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.load_check", description=__doc__)
    top.add_argument("directory", type=Path, metavar="DIR", help="a MorphoQuant checkpoint")
    top.add_argument("--rounds", type=int, default=5, help="of the checks alone, files cached and not")
    top.add_argument("--engines", type=int, default=0, metavar="ROUNDS", help="of whole engines, read from the disk")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/load_check"))
    top.add_argument("--name", help="of the file (default: DIR's)")
    return top


def summarize(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Median seconds of each entry, and relative to `base`."""
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        name: {"median": medians[name], "ratio": medians[name] / medians[base], "seconds": seconds[name]}
        for name in seconds
    }


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; the JSON object."""
    from benchmarks.common.machine import machine, versions
    from benchmarks.load_check import checks, engine

    directory, load = arguments.directory, os.getloadavg()[0]
    found: dict[str, Any] = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "load": load,
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "checks": {},
        "engines": {},
    }
    for state, cold in (("cached", False), ("from disk", True)):
        timed = checks.measure(directory, arguments.rounds, cold=cold)
        found["checks"][state] = summarize(timed, "read every tensor")
    if arguments.engines:
        found["engines"]["from disk"] = summarize(engine.measure(directory, arguments.engines), "headers")
    return found


def main() -> None:
    """Measure, write the file, print it in short."""
    arguments = parser().parse_args()
    with one_line_errors():
        summary = run(arguments, "python -m benchmarks.load_check " + shlex.join(sys.argv[1:]))
        for what in ("checks", "engines"):
            for state, entries in summary[what].items():
                for name, entry in entries.items():
                    print(f"{what}, {state}: {name}: {entry['median']:.3f} s, {entry['ratio']:.2f} x")
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / f"{arguments.name or arguments.directory.name}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
