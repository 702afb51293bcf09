"""python -m benchmarks.kv_scales MODEL DATA: scales by modality in an FP8 cache, beside one for each layer.

MODEL is the trained omni model of `benchmarks.models.tiny_omni`, DATA its folder of questions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from benchmarks.common.command import one_line_errors
from benchmarks.common.machine import load, machine, versions
from benchmarks.kv_scales.scales import ROWS, Change, Magnitudes, changed_attention, rounding
from benchmarks.models.tiny_omni.data.questions import test_questions
from benchmarks.models.tiny_omni.evaluate import answer_log_probs


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.kv_scales", description=__doc__)
    top.add_argument("model", type=Path, metavar="MODEL")
    top.add_argument("data", type=Path, metavar="DATA")
    top.add_argument("--questions", type=int, default=50, help="of each kind; as many more are calibrated on")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/kv_scales"))
    return top


def divergence(plain: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    """Mean divergence of the vocabularies at each token of the answers, and the share of other most likely tokens."""
    one, two = torch.cat(plain).double(), torch.cat(other).double()
    apart = (one.exp() * (one - two)).sum(-1)
    return {
        "divergence": float(apart.mean()),
        "other tokens": float((one.argmax(-1) != two.argmax(-1)).double().mean()),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Magnitudes by layer and modality, and what each kind of scales costs."""
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    placeholders = {getattr(thinker.config, f"{row}_token_index"): ROWS.index(row) for row in ROWS[1:]}

    def ask(change: Change, seed: int) -> list[Tensor]:
        with changed_attention(thinker, placeholders, change):
            return answer_log_probs(thinker, processor, test_questions(arguments.data, arguments.questions, seed))

    magnitudes = Magnitudes()
    ask(magnitudes, seed=1)
    plain = ask(lambda layer, part, tensor, modality: tensor, seed=0)
    found = {
        name: divergence(plain, ask(rounding(magnitudes.found, by_modality), seed=0))
        for name, by_modality in (("one scale for each layer", False), ("scales by modality", True))
    }
    largest = {
        f"{part} of layer {layer}": dict(zip(ROWS, values.tolist(), strict=True))
        for (layer, part), values in magnitudes.found.items()
    }
    return {"magnitudes": largest, "scales": found}


def main() -> None:
    """Measure, write the file, print it in short."""
    arguments = parser().parse_args()
    with one_line_errors():
        command = "python -m benchmarks.kv_scales " + shlex.join(sys.argv[1:])
        result = {"command": command, "machine": machine(), "versions": versions(), **load()} | measure(arguments)
        for name, entry in result["scales"].items():
            print(f"{name}: " + ", ".join(f"{figure} {value:.6f}" for figure, value in entry.items()))
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / "tiny-omni.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
