"""python -m benchmarks.error_sources MODEL CHECKPOINT: where the errors of the checkpoint's linears come from.

MODEL is a text model, CHECKPOINT made of it. Weights are fitted to the texts that `benchmarks.accuracy` calibrates on,
and measured on the texts that it evaluates.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.command import one_line_errors

HELD_OUT_WINDOWS = 2
WINDOW_TOKENS = 512
BLOCKS = (2, 8)
# The pull that was the same for all linears before, and those that grow with the channels for each token.
PULLS = (0.02,)
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.error_sources", description=__doc__)
    top.add_argument("model", type=Path)
    top.add_argument("checkpoint", type=Path)
    top.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    top.add_argument("--windows", type=int, default=HELD_OUT_WINDOWS, help="of each text to measure on")
    top.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    top.add_argument(
        "--corpus", type=Path, default=Path(".cache/accuracy/corpus"), help="folder of the texts, fetched if missing"
    )
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/error_sources"), help="of the tables")
    return top


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure every input of the blocks; the JSON object of the result."""
    from transformers import AutoTokenizer

    from benchmarks.common import corpus
    from benchmarks.common.machine import load, machine, versions
    from benchmarks.common.windows import calibration_windows, measuring_windows
    from benchmarks.error_sources.inputs import load_pair, paired_inputs
    from benchmarks.error_sources.measure import CALIBRATION, measure

    tokenizer, size = AutoTokenizer.from_pretrained(arguments.model), arguments.window_tokens
    folder = corpus.fetch(arguments.corpus)
    fitted = calibration_windows(tokenizer, folder, size)
    held = measuring_windows(tokenizer, folder, size, arguments.windows)
    pair = load_pair(arguments.model, arguments.checkpoint)
    rows = []
    for block in arguments.blocks:
        for inputs in paired_inputs(arguments.model, pair, block, {CALIBRATION: fitted, **held}):
            rows.append(measure(inputs, PULLS, STRENGTHS))
            print(f"{inputs.name}: served {rows[-1]['served']:.4f}", flush=True)
    return {
        "benchmark": "error_sources",
        "command": command,
        "machine": machine(),
        "versions": versions(),
        **load(),
        "model": arguments.model.name,
        "held_out_tokens": sum(len(window) for windows in held.values() for window in windows),
        "rows": rows,
    }


def main() -> None:
    """Measure, print, and keep the result under the model's name."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = parser().parse_args()
    command = shlex.join(["python", "-m", "benchmarks.error_sources", *sys.argv[1:]])
    with one_line_errors():
        from benchmarks.common.files import write_results
        from benchmarks.error_sources.report import markdown

        result = run(arguments, command)
        write_results(arguments.results, arguments.model.name, result, markdown(result))
        print(markdown(result))


if __name__ == "__main__":
    main()
