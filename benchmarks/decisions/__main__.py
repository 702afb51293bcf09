"""python -m benchmarks.decisions: measure the costs and gains of the format's decisions on single layers."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import one_line_errors

if TYPE_CHECKING:
    from benchmarks.decisions.inputs import LinearInput
    from benchmarks.decisions.layers import Result, Variant

BLOCKS = (4, 14, 24)
# Blocks in which the first token is massive: the massive row is compared there.
MASSIVE_BLOCKS = (14, 24)
WINDOW_TOKENS = 512
CALIBRATION_WINDOWS = {"python-topics": 3, "report": 3, "poetry": 3, "numpy": 3, "stdlib": 3, "licence": 1}
HELD_OUT_WINDOWS = 2
# Hidden size of a 7B model; as many tokens to calibrate on as of the real inputs.
GENERATED = {"in_features": 3584, "out_features": 512, "tokens": 8192, "held_out": 2048}
LEVELS = (0, 16)
COST_SHAPES = tuple((tokens, in_features) for in_features in (3584, 18944) for tokens in (1, 128))
COST_RUNS = 200


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    top.add_argument("--work", type=Path, default=Path(".cache/demo"), help="folder of the model, written if missing")
    top.add_argument(
        "--corpus", type=Path, default=Path(".cache/accuracy/corpus"), help="folder of the texts, fetched if missing"
    )
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/decisions"), help="folder of the tables")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--threads", type=int, default=1, help="of torch")
    return top


def cut_windows(tokenizer: Any, corpus: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of token ids to calibrate on and to measure on."""
    from benchmarks.common import texts
    from benchmarks.common.windows import evaluation_windows, spread

    calibration = []
    for name, count in CALIBRATION_WINDOWS.items():
        ids = tokenizer(texts.CALIBRATION[name](corpus), verbose=False)["input_ids"]
        calibration += [ids[at : at + WINDOW_TOKENS] for at in spread(len(ids), WINDOW_TOKENS, count, name)]
    held_out = [
        window
        for name, text in texts.EVALUATION.items()
        for window in evaluation_windows(tokenizer, text(corpus), name, WINDOW_TOKENS, HELD_OUT_WINDOWS)
    ]
    return calibration, held_out


def measure_real(
    inputs: list[LinearInput], choices: list[Variant], seed: int, say: Callable[[str], None]
) -> tuple[list[Result], list[str]]:
    """Results of real inputs in every way that is compared, and which group sizes the format does not allow."""
    from benchmarks.decisions import layers

    others = [layers.Variant(centre=kind) for kind in layers.CENTRES if kind != "real"]
    found: list[Result] = []
    skipped: dict[str, None] = {}
    for own in inputs:
        say(own.name)
        fitting = [variant for variant in choices if layers.allows(own.in_features, variant.group_size)]
        for variant in choices:
            if variant not in fitting:
                skipped[f"G = {variant.group_size} at K = {own.in_features}"] = None
        extra = [layers.Variant(massive_row=False)] if own.block in MASSIVE_BLOCKS else []
        for variant in [*fitting, *others, *extra]:
            found += layers.measure(own, variant, seed)
    return found, list(skipped)


def measure_generated(wide: LinearInput, choices: list[Variant], seed: int, say: Callable[[str], None]) -> list[Result]:
    """Results of the generated input with every choice of scales."""
    from benchmarks.decisions import layers

    found: list[Result] = []
    for variant in choices:
        say(f"{wide.name}, G = {variant.group_size}, {variant.scale_levels or 'free'} levels")
        found += layers.measure(wide, variant, seed)
    return found


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure everything; the JSON object of decisions.json."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.common import corpus
    from benchmarks.common.machine import machine, versions
    from benchmarks.decisions import layers, sizes, summary
    from benchmarks.decisions.cost import measure_cost
    from benchmarks.decisions.inputs import generated_input, real_inputs
    from benchmarks.models import smollm2
    from morphoquant_vllm.numerics.limits import GROUP_SIZES

    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {what}", flush=True)

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = smollm2.write_model(arguments.work / smollm2.NAME)
    texts_directory = corpus.fetch(arguments.corpus)
    calibration, held_out = cut_windows(AutoTokenizer.from_pretrained(model), texts_directory)
    say("the 16-bit model runs over the windows")
    inputs = real_inputs(model, BLOCKS, calibration, held_out)
    choices = [layers.Variant(size, levels) for size in GROUP_SIZES for levels in LEVELS]
    real, skipped = measure_real(inputs, choices, arguments.seed, say)
    wide = generated_input(**GENERATED, seed=arguments.seed)
    generated = measure_generated(wide, choices, arguments.seed, say)
    say("the quantizer's cost")
    cost = [measure_cost(tokens, in_features, COST_RUNS, arguments.seed) for tokens, in_features in COST_SHAPES]
    return {
        "benchmark": "decisions",
        "command": command,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "machine": machine(),
        "versions": versions(),
        "seconds": time.monotonic() - started,
        "model": smollm2.NAME,
        "blocks": list(BLOCKS),
        "windows": {"calibration": len(calibration), "held_out": len(held_out), "tokens": WINDOW_TOKENS},
        "calibration_windows": CALIBRATION_WINDOWS,
        "generated": GENERATED,
        "skipped": skipped,
        "scales": {
            "Real inputs, all linears": summary.scales(real),
            "Real inputs, K = 1536 (down_proj)": summary.scales([r for r in real if r.in_features == 1536]),
            f"Generated, K = {wide.in_features}": summary.scales(generated),
        },
        "centres": summary.centres(real),
        "massive": summary.massive(real, sum(map(len, held_out))),
        "quantizer_cost": cost,
        "bytes_model": "Qwen2.5-7B (28 heads, hidden 3584, intermediate 18944), tensor_parallel 4",
        "bytes": sizes.all_bytes(),
        "linears": [result.to_dict() for result in real + generated],
    }


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = parser().parse_args()
    if arguments.threads < 1 or arguments.seed < 0:
        sys.exit("error: --threads must be at least 1 and --seed at least 0")
    command = shlex.join(["python", "-m", "benchmarks.decisions", *sys.argv[1:]])
    with one_line_errors():
        from benchmarks.decisions import report

        summary = run(arguments, command)
        for path in report.write(summary, arguments.results):
            print(path)
        print(report.markdown(summary))


if __name__ == "__main__":
    main()
