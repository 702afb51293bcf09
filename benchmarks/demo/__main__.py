"""python -m benchmarks.demo: calibrate SmolLM2-135M-Instruct, serve it with vLLM, ask it something, measure it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import texts
from benchmarks.common.files import weight_bytes, write_atomically
from benchmarks.common.machine import machine, versions
from benchmarks.common.server import ServerError, exit_on_signals, serve
from benchmarks.common.windows import excerpts
from benchmarks.demo.perplexity import perplexity, windows
from benchmarks.models import smollm2

QUESTION = "What is the capital of France? Answer in one sentence."
WINDOW_TOKENS, WINDOWS = 512, 3
# Fewer samples than the defaults: the demo must end in minutes on two cores.
CALIBRATION_WINDOWS, SAMPLE_TOKENS = 14, 8192
# Characters of a window of the manual, on average a little more than WINDOW_TOKENS.
WINDOW_CHARACTERS = 2400
# A chat in the model's template: its first token is massive, and no text of the manual begins with it.
CHAT = Path(__file__).with_name("chat.jsonl")
SERVE_ARGUMENTS = ("--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager")


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def calibrate(model: Path, work: Path) -> Path:
    """Run the console command as a user would."""
    data = work / "python-reference.txt"
    data.write_text(excerpts(texts.python_topics()[0], CALIBRATION_WINDOWS, WINDOW_CHARACTERS), encoding="utf-8")
    output = work / "SmolLM2-135M-Instruct-MorphoQuant"
    command = [
        str(Path(sys.executable).with_name("morphoquant")),
        "calibrate",
        str(model),
        *("--data", str(data), "--data", os.path.relpath(CHAT), "--output", str(output)),
        # An interrupted demo begins anew: it shows a whole calibration by the current code.
        *("--overwrite", "--restart", "--effort", "fast", "--sample-tokens", str(SAMPLE_TOKENS)),
    ]
    print("$ " + " ".join(["morphoquant", *command[1:]]), flush=True)
    subprocess.run(command, check=True)
    return output


def evaluate(model: Path, work: Path, prompts: dict[str, list[list[int]]]) -> dict[str, float]:
    """Serve `model`, ask it the question, and measure its perplexity on each text."""
    from openai import OpenAI

    log = work / f"serve-{model.name}.log"
    print(f"$ vllm serve {model} {' '.join(SERVE_ARGUMENTS)}", flush=True)
    with serve(model, log, SERVE_ARGUMENTS) as server:
        client = OpenAI(base_url=server.openai_url, api_key="none", timeout=300)
        name = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0
        )
        print(f"question: {QUESTION}")
        print(f"answer:   {answer.choices[0].message.content!r}", flush=True)
        return {text: perplexity(client, name, windows_) for text, windows_ in prompts.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    top.add_argument("--work", type=Path, default=Path(".cache/demo"), help="folder of model, checkpoint and logs")
    top.add_argument("--result", type=Path, help="also write the figures to this JSON file")
    return top


def main() -> None:
    """All four steps, and the result."""
    arguments = parser().parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    print(machine())

    step("1/4 the 16-bit model, as a plain Hugging Face directory")
    model = smollm2.write_model(work / smollm2.NAME)
    print(f"{model}: {weight_bytes(model) / 1e6:.1f} MB of weights (from a Q4_1 file, dequantized to bfloat16)")
    prompts = {
        "Python reference, topics held back": texts.python_topics()[1],
        "PyTorch documentation": texts.torch_documentation(),
    }
    cut = {name: windows(model, text, tokens=WINDOW_TOKENS, count=WINDOWS) for name, text in prompts.items()}

    step("2/4 calibrate: W4A4 MorphoQuant checkpoint")
    checkpoint = calibrate(model, work)

    step("3/4 serve the 16-bit model")
    plain = evaluate(model, work, cut)

    step("4/4 serve the MorphoQuant checkpoint")
    served = evaluate(checkpoint, work, cut)

    step("result")
    print(f"{'perplexity':40} {'16 bit':>8} {'W4A4':>8}   ({WINDOWS} windows of {WINDOW_TOKENS} tokens, by vLLM)")
    for name in cut:
        print(f"{name:40} {plain[name]:8.2f} {served[name]:8.2f}")
    rate = json.loads((checkpoint / "morphoquant_calibration.json").read_text())["escape_rate"]
    before, after = weight_bytes(model), weight_bytes(checkpoint)
    print(f"weights on disk: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.2f}x)")
    print(
        f"escape rate in calibration: {rate:.2%} of activation codes carry 8 bits -> {4 + 4 * rate:.2f} bits on average"
    )
    seconds = time.monotonic() - started
    print(f"took {seconds:.0f} s")
    if arguments.result is not None:
        figures = {"perplexity": {"16 bit": plain, "W4A4": served}, "escape_rate": rate, "bytes": [before, after]}
        write_atomically(
            arguments.result,
            json.dumps({"machine": machine(), "versions": versions(), **figures, "seconds": seconds}, indent=1) + "\n",
        )


if __name__ == "__main__":
    exit_on_signals()
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `morphoquant calibrate` failed with exit code {error.returncode}; its message stands above")
    except ServerError as error:
        sys.exit(f"error: {error}")
