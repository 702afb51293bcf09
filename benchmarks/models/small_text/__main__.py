"""python -m benchmarks.models.small_text: train the language model, or take the cached one, and say its perplexity."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.command import one_line_errors
from benchmarks.models.small_text import books
from benchmarks.models.small_text.train import TrainingSettings, trained_model


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: list[int], window: int) -> tuple[float, int]:
    """Perplexity over windows that follow one another, each predicted on its own, and the number of tokens."""
    losses, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        tokens = torch.tensor([ids[start : start + window]])
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        losses += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += window - 1
    return math.exp(losses / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/small_text"), help="folder of the model and the texts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    started, settings = time.monotonic(), TrainingSettings(arguments.seed)
    directory = trained_model(arguments.work, settings, lambda line: print(line, flush=True))
    print(f"model: {directory} ({time.monotonic() - started:.0f} s)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    print("perplexity of a token, by transformers in float32, on held-out texts")
    for name, text in books.EVALUATION.items():
        ids = tokenizer(text(arguments.work / "corpus"), verbose=False)["input_ids"]
        value, count = perplexity(model, ids, settings.window)
        print(f"  {name:10} {value:7.2f}  ({count} tokens)", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
