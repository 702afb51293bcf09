"""python -m benchmarks.models.tiny_omni: train the omni model, or take the cached one, and say how it answers."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from transformers import AutoProcessor

from benchmarks.common.command import one_line_errors
from benchmarks.models.decoder import load
from benchmarks.models.tiny_omni.data.questions import calibration_file, test_questions
from benchmarks.models.tiny_omni.evaluate import accuracy, answers_transformers, standard_error
from benchmarks.models.tiny_omni.train import TrainingSettings, experts_training, trained_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/omni"), help="folder of the model and the media")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the questions")
    parser.add_argument("--experts", action="store_true", help="a Qwen3-Omni-MoE in place of a Qwen2.5-Omni")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    settings = (experts_training if arguments.experts else TrainingSettings)(arguments.seed)
    model = trained_model(arguments.work, settings=settings, progress=lambda line: print(line, flush=True))
    print(f"model: {model} ({time.monotonic() - started:.0f} s)")
    print(f"calibration data: {calibration_file(arguments.work, arguments.seed)}", flush=True)

    questions = test_questions(arguments.work, seed=arguments.seed)
    answers = answers_transformers(load(model), AutoProcessor.from_pretrained(model), questions)
    print("exact answers of the 16-bit model, by transformers in float32 (+- one standard error)")
    for kind, (right, total) in accuracy(questions, answers).items():
        print(f"  {kind:12} {right / total:7.1%} +- {standard_error(right, total):.1%}  ({right} of {total})")


if __name__ == "__main__":
    with one_line_errors():
        main()
