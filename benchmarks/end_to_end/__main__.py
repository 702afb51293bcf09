"""python -m benchmarks.end_to_end MODEL CHECKPOINT: what learning a checkpoint end to end would buy.

MODEL is a text model, CHECKPOINT made of it. Its linears learn to give the 16-bit model's next tokens, on windows of
the texts that `benchmarks.accuracy` calibrates on. Perplexity is measured on the texts that it evaluates. Nothing is
written but the result: no checkpoint is made of what was learned.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.end_to_end.evaluate import Losses

WINDOW_TOKENS = 512


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    top.add_argument("model", type=Path)
    top.add_argument("checkpoint", type=Path)
    top.add_argument("--scale-rate", type=float, default=1e-4, help="of steps, output scales and constants")
    top.add_argument("--weight-rate", type=float, default=0.0, help="of weights, in codes; 0: they are fixed")
    top.add_argument("--epochs", type=int, default=1)
    top.add_argument(
        "--fresh", action="store_true", help="learn from windows between those that the checkpoint was calibrated on"
    )
    top.add_argument("--windows", type=int, default=4, help="of each text to measure on")
    top.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    top.add_argument(
        "--corpus", type=Path, default=Path(".cache/accuracy/corpus"), help="folder of the texts, fetched if missing"
    )
    top.add_argument("--name", default="end-to-end", help="of the result")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/end_to_end"), help="of the tables")
    return top


def texts_of(arguments: argparse.Namespace) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """The windows to learn from, and those to measure on by text."""
    from transformers import AutoTokenizer

    from benchmarks.common import corpus, texts
    from benchmarks.common.windows import evaluation_windows

    tokenizer, size = AutoTokenizer.from_pretrained(arguments.model), arguments.window_tokens
    folder = corpus.fetch(arguments.corpus)
    learned = []
    for name, count in texts.CALIBRATION_WINDOWS.items():
        # Every other one of twice as many windows lies where calibration's do.
        spread = evaluation_windows(tokenizer, texts.CALIBRATION[name](folder), name, size, 2 * count - 1)
        learned += spread[1::2] if arguments.fresh else spread[::2]
    held = {
        name: evaluation_windows(tokenizer, text(folder), name, size, arguments.windows)
        for name, text in texts.EVALUATION.items()
    }
    return learned, held


def taught(model: Path, learned: list[list[int]], held: dict[str, list[list[int]]]) -> tuple[Losses, list[Tensor]]:
    """The 16-bit model's losses by text, and its last hidden states of each window to learn from."""
    import torch

    from benchmarks.end_to_end.evaluate import losses
    from benchmarks.end_to_end.learn import last_states
    from benchmarks.models import decoder

    teacher = decoder.load(model)
    exact = losses(teacher, held)
    with torch.no_grad():
        return exact, [last_states(teacher, window) for window in learned]


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Learn and measure after each epoch; the JSON object of the result."""
    import torch

    from benchmarks.common.machine import load, machine, versions
    from benchmarks.end_to_end.evaluate import escape_rate, losses, perplexities, ratio
    from benchmarks.end_to_end.learn import Learner, Rates
    from benchmarks.end_to_end.student import load_student

    learned, held = texts_of(arguments)
    exact, states = taught(arguments.model, learned, held)
    student, inputs = load_student(arguments.checkpoint)
    learner = Learner(student, inputs, learned, states)
    tokens = arguments.window_tokens
    rows: list[dict[str, Any]] = []

    def note(epoch: int, divergence: float | None, seconds: float) -> None:
        for given in inputs:
            given.forget()
        found = losses(student, held)
        rows.append({"epoch": epoch, "losses": found, "perplexity": perplexities(found, tokens)})
        rows[-1] |= {"over_16bit": ratio(found, exact, tokens), "over_start": ratio(found, rows[0]["losses"], tokens)}
        rows[-1] |= {"escapes": escape_rate(inputs), "changed_codes": learner.changed_codes()}
        rows[-1] |= {"divergence": divergence, "cpu_seconds": seconds}
        print({name: value for name, value in rows[-1].items() if name != "losses"}, flush=True)

    with torch.no_grad():
        first = sum(float(learner.divergence(window)) for window in range(len(learned))) / len(learned)
    note(0, first, 0.0)
    begun = time.process_time()
    rates = Rates(arguments.scale_rate, arguments.weight_rate)
    for epoch, divergence in enumerate(learner.epochs(rates, arguments.epochs)):
        spent = time.process_time() - begun
        note(epoch + 1, divergence, spent)
        begun = time.process_time()
    return {
        "benchmark": "end_to_end",
        "command": command,
        "machine": machine(),
        "versions": versions(),
        **load(),
        "model": arguments.model.name,
        "tokens": sum(map(len, learned)),
        "held_out_tokens": sum(len(window) for windows in held.values() for window in windows),
        "exact": {"losses": exact, "perplexity": perplexities(exact, tokens)},
        "rows": rows,
    }


def main() -> None:
    """Measure, print, and keep the result."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = parser().parse_args()
    command = shlex.join(["python", "-m", "benchmarks.end_to_end", *sys.argv[1:]])
    with one_line_errors():
        from benchmarks.common.files import write_results
        from benchmarks.end_to_end.report import markdown

        result = run(arguments, command)
        write_results(arguments.results, arguments.name, result, markdown(result))
        print(markdown(result))


if __name__ == "__main__":
    main()
