"""Rounds the decoder's linears with GPTQModel W4A16 and writes what they stand for; GPTQModel's environment runs it.

The one argument is a JSON file: see Request in environment.py, with "model" and "output".
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# Two workers, the fewest that its loader of models takes. On one core or two its own choice is one, and it would stop.
WORKERS = {"GPTQMODEL_CPU_WORKERS": "2"}


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Weight [N, K] in float32 of each packed layer, by its name; scales of the model become float32."""
    # Scales are stored in float16; products with them are made in float32.
    model.float()
    return {
        name: module.dequantize_weight().detach().t().contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if version("gptqmodel") != job["version"]:
        sys.exit(f"gptqmodel {job['version']} is wanted; {version('gptqmodel')} is installed")
    os.environ.update({**WORKERS, **os.environ})
    from gptqmodel import GPTQConfig, GPTQModel

    torch.manual_seed(job["seed"])
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    # In format "gptq" a quantized model holds zero points less one, for its file; its layers read them as they are.
    # Offloaded layers would have no data.
    config = GPTQConfig(
        bits=4, group_size=job["group_size"], sym=True, format="gptq_v2", offload_to_disk=False, **job["options"]
    )
    # It writes a table of losses into the working directory.
    with TemporaryDirectory() as folder, chdir(folder):
        model = GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)
        model.quantize(samples, batch_size=1)
    save_file(dequantized(model.model), job["output"])


if __name__ == "__main__":
    main()
