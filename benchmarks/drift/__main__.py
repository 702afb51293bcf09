"""python -m benchmarks.drift SOURCE DIR: how far ranks and compilation move log probabilities, 4 bits beside 16."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common.command import one_line_errors
from benchmarks.common.machine import load, machine, versions
from benchmarks.common.texts import python_topics
from benchmarks.drift.engine import logprobs
from benchmarks.drift.figures import gaps, moved_codes, ties
from benchmarks.drift.residual import residual_drift

# How an engine is started, beside one rank in eager mode.
VARIANTS: dict[str, dict[str, Any]] = {
    "two ranks": {"enforce_eager": True, "tensor_parallel_size": 2},
    "compiled": {"enforce_eager": False},
}
PLAIN = "one rank in eager mode"
# float32 shows how much is left if no value between two operations is rounded to 16 bits.
DTYPES = ("bfloat16", "float32")
# Limits between codes: where rounding half to even puts them, and off the values of bfloat16.
SHIFTS = {"half to even": 0.0, "limits moved by 1/1000 step": 1e-3}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    top.add_argument("source", type=Path, metavar="SOURCE", help="the 16-bit model")
    top.add_argument("directory", type=Path, metavar="DIR", help="a MorphoQuant checkpoint of it")
    top.add_argument("--prompts", type=int, default=8)
    top.add_argument("--tokens", type=int, default=256, help="of each prompt, of Python's manual")
    top.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/drift"))
    top.add_argument("--name", help="of the file (default: DIR's)")
    about = "simulate with transformers, for a Llama, what keeping values in float32 leaves of the drift"
    top.add_argument("--residual", action="store_true", help=about)
    return top


def prompts(source: Path, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of a text that calibration does not see, in pieces."""
    ids = AutoTokenizer.from_pretrained(source)(python_topics()[1][: 40 * count * tokens])["input_ids"]
    return [ids[index * tokens : (index + 1) * tokens] for index in range(count)]


def drift(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """The differences of each variant from one rank in eager mode, by model and dtype."""
    engines: dict[str, tuple[Path, dict[str, Any]]] = {}
    for dtype in arguments.dtypes:
        for name, model in (("16 bit", arguments.source), ("MorphoQuant", arguments.directory)):
            common = {"dtype": dtype, "max_model_len": arguments.tokens + 8, "max_num_seqs": 4}
            for variant, settings in {PLAIN: {"enforce_eager": True}, **VARIANTS}.items():
                engines[f"{name}, {dtype}, {variant}"] = model, common | settings
    found = logprobs(engines, prompts(arguments.source, arguments.prompts, arguments.tokens))
    models = dict.fromkeys(name.rpartition(", ")[0] for name in found)
    return {
        model: {variant: gaps(found[f"{model}, {variant}"], found[f"{model}, {PLAIN}"]) for variant in VARIANTS}
        for model in models
    }


def tie_rule() -> dict[str, float]:
    """The share of codes that noise of one unit in the last place moves, by the limits between codes."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    # Steps of an even and of an odd fraction of the values' range.
    step = 0.4375
    moved = {f"moved codes, {name}": moved_codes(x, step, shift) for name, shift in SHIFTS.items()}
    return {"values at a tie": ties(x, step), **moved}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the file."""
    if arguments.residual:
        asked = prompts(arguments.source, arguments.prompts, arguments.tokens)
        return {"residual": residual_drift(arguments.source, arguments.directory, asked)}
    return {"tie rule": tie_rule(), "drift": drift(arguments)}


def lines(figures: dict[str, Any], *names: str) -> Iterator[str]:
    """Every innermost entry of nested figures, after the names that lead to it."""
    if all(isinstance(value, float) for value in figures.values()):
        yield f"{', '.join(names)}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items())
        return
    for name, entry in figures.items():
        yield from lines(entry, *names, name)


def main() -> None:
    """Measure, write the file, print it in short."""
    arguments = parser().parse_args()
    with one_line_errors():
        command = "python -m benchmarks.drift " + shlex.join(sys.argv[1:])
        result = {"command": command, "machine": machine(), "versions": versions(), **load()}
        result |= {"prompts": arguments.prompts, "tokens": arguments.tokens}
        figures = measure(arguments)
        print("\n".join(lines(figures)))
        arguments.results.mkdir(parents=True, exist_ok=True)
        name = arguments.name or arguments.directory.name + ("-residual" if arguments.residual else "")
        path = arguments.results / f"{name}.json"
        path.write_text(json.dumps(result | figures, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
