"""python -m benchmarks.models.tiny_omni: train the omni model, or take the cached one, and say how it answers."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from benchmarks.common.command import one_line_errors
from benchmarks.models.tiny_omni.data.questions import calibration_file, test_questions
from benchmarks.models.tiny_omni.evaluate import accuracy, answers_transformers, standard_error
from benchmarks.models.tiny_omni.train import trained_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/omni"), help="folder of the model and the media")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the questions")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    model = trained_model(arguments.work, arguments.seed, progress=lambda line: print(line, flush=True))
    print(f"model: {model} ({time.monotonic() - started:.0f} s)")
    print(f"calibration data: {calibration_file(arguments.work, arguments.seed)}", flush=True)

    questions = test_questions(arguments.work, seed=arguments.seed)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    answers = answers_transformers(thinker, AutoProcessor.from_pretrained(model), questions)
    print("exact answers of the 16-bit model, by transformers in float32 (+- one standard error)")
    for kind, (right, total) in accuracy(questions, answers).items():
        print(f"  {kind:12} {right / total:7.1%} +- {standard_error(right, total):.1%}  ({right} of {total})")


if __name__ == "__main__":
    with one_line_errors():
        main()
