"""python -m benchmarks.damping MODEL: which damping of the rounding holds for other text, by channels and tokens.

MODEL is a 16-bit text model. Weights alone are rounded, for the texts that `benchmarks.accuracy` calibrates on, or for
a share of their windows. The texts that it evaluates judge.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import one_line_errors

BLOCKS = (3, 8, 20)
WINDOW_TOKENS = 512
JUDGING_WINDOWS = 6
# Every one of so many windows is seen: the fewer tokens, the more channels there are for each.
EVERY = (16, 4, 1)
# The damping that was the same for all inputs before.
FIXED = 0.05
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.damping", description=__doc__)
    top.add_argument("model", type=Path)
    top.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    top.add_argument(
        "--corpus", type=Path, default=Path(".cache/accuracy/corpus"), help="folder of the texts, fetched if missing"
    )
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/damping"), help="of the tables")
    return top


def cut_windows(model: Path, texts: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of token ids to round for, and to judge by."""
    from transformers import AutoTokenizer

    from benchmarks.common import corpus
    from benchmarks.common.windows import calibration_windows, measuring_windows

    tokenizer, folder = AutoTokenizer.from_pretrained(model), corpus.fetch(texts)
    seen = calibration_windows(tokenizer, folder, WINDOW_TOKENS)
    judging = measuring_windows(tokenizer, folder, WINDOW_TOKENS, JUDGING_WINDOWS)
    return seen, [window for windows in judging.values() for window in windows]


def measured(
    source: Path, chosen: Sequence[int], every: Sequence[int], seen: Sequence[list[int]], judging: Sequence[list[int]]
) -> Iterator[dict[str, Any]]:
    """The figures of every input of the chosen blocks, for `every` share of the windows `seen`.

    MorphoQuantError if the model of `source` has no such block.
    """
    import torch

    from benchmarks.damping.measure import measure
    from benchmarks.models import decoder
    from morphoquant_vllm.errors import MorphoQuantError

    model = decoder.load(source)
    blocks = decoder.blocks_of(model, source)
    if not set(chosen) <= set(range(len(blocks))):
        raise MorphoQuantError(f"{source} has blocks 0 to {len(blocks) - 1}; choose some of those")
    samples = [{"input_ids": torch.tensor([list(ids)])} for ids in (*seen, *judging)]
    entries = decoder.capture(model, blocks, samples)
    for index, block in enumerate(blocks[: max(chosen) + 1]):
        with torch.no_grad():
            groups, outputs = decoder.observe(block, index, entries)
        for group in groups if index in chosen else []:
            weight = torch.cat([block.get_parameter(f"{name}.weight").detach() for name in group.names])
            fitted, others = group.inputs[: len(seen)], group.inputs[len(seen) :]
            for share in every:
                figures = measure(weight, fitted[::share], others, FIXED, STRENGTHS)
                yield {"input": f"{index}.{group.names[0]}", **figures}
        del groups
        for entry, hidden in zip(entries, outputs, strict=True):
            entry.hidden = hidden


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure every input of the blocks; the JSON object of the result."""
    from benchmarks.common.machine import load, machine, versions
    from benchmarks.damping.measure import GROUP_SIZE
    from benchmarks.damping.report import means

    seen, judging = cut_windows(arguments.model, arguments.corpus)
    rows = []
    for row in measured(arguments.model, arguments.blocks, EVERY, seen, judging):
        rows.append(row)
        print(f"{row['input']}, {row['tokens']} tokens: {row['losses']['fixed']:.5f}", flush=True)
    return {
        "benchmark": "damping",
        "command": command,
        "machine": machine(),
        "versions": versions(),
        **load(),
        "model": arguments.model.name,
        "group_size": GROUP_SIZE,
        "fixed": FIXED,
        "judging_tokens": sum(len(window) - 1 for window in judging),
        "means": means(rows),
        "rows": rows,
    }


def main() -> None:
    """Measure, print, and keep the result under the model's name."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = parser().parse_args()
    command = shlex.join(["python", "-m", "benchmarks.damping", *sys.argv[1:]])
    with one_line_errors():
        from benchmarks.common.files import write_results
        from benchmarks.damping.report import markdown

        result = run(arguments, command)
        write_results(arguments.results, arguments.model.name, result, markdown(result))
        print(markdown(result))


if __name__ == "__main__":
    main()
