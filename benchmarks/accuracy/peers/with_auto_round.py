"""Rounds the decoder's linears with AutoRound W4A16 and writes what they stand for; AutoRound's environment runs it.

The one argument is a JSON file: see Request in environment.py, with "model" and "output".
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if version("auto-round") != job["version"]:
        sys.exit(f"auto-round {job['version']} is wanted; {version('auto-round')} is installed")
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    samples = [{"input_ids": torch.tensor([ids])} for ids in job["samples"]]
    tuned, _ = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=job["group_size"],
        dataset=samples,
        seqlen=len(job["samples"][0]),
        nsamples=len(samples),
        seed=job["seed"],
        device_map="cpu",
        **job["options"],
    ).quantize()
    weights = {
        name: module.weight.detach().float().contiguous()
        for name, module in tuned.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    save_file(weights, job["output"])


if __name__ == "__main__":
    main()
