"""Runs another quantizer in its environment and reads the dequantized weights that it writes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common.files import write_atomically
from morphoquant_vllm.errors import MorphoQuantError

SCRIPTS = {
    "auto-round": Path(__file__).with_name("with_auto_round.py"),
    "gptqmodel": Path(__file__).with_name("with_gptqmodel.py"),
}


@dataclass(frozen=True)
class Request:
    """Everything that decides the weights: the script reads it as JSON, with the two paths beside it."""

    version: str
    group_size: int
    seed: int
    # Options of the quantizer itself, by its own names.
    options: Mapping[str, Any]
    # Token ids of the calibration samples, all of one length.
    samples: Sequence[Sequence[int]]


def parse_environments(given: Sequence[str]) -> dict[str, Path]:
    """Python executables by tool, from "tool=path" each; MorphoQuantError naming the wrong one."""
    found = {}
    for entry in given:
        tool, _, path = entry.partition("=")
        if tool not in SCRIPTS or not path:
            raise MorphoQuantError(f"--peer {entry}: not TOOL=PYTHON with one of the tools {', '.join(SCRIPTS)}")
        if not Path(path).is_file():
            raise MorphoQuantError(f"--peer {entry}: no such file; give the python of an environment with {tool}")
        found[tool] = Path(path)
    return found


def write_weights(python: Path, tool: str, model: Path, request: Request, output: Path) -> None:
    """Have `python` run the tool's script on `model`, unless `output` is there; its log lies beside it.

    MorphoQuantError naming the log if the script fails.
    """
    if output.is_file():
        return
    job, log, partial = (output.with_suffix(suffix) for suffix in (".json", ".log", ".partial"))
    paths = {"model": str(model.resolve()), "output": str(partial.resolve())}
    write_atomically(job, json.dumps({**asdict(request), **paths}))
    # The environment must not see this project's packages.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with log.open("wb") as written:
        done = subprocess.run(
            [str(python), str(SCRIPTS[tool]), str(job.resolve())],
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**environment, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode or not partial.is_file():
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise MorphoQuantError(f"{tool} ended with exit status {done.returncode}; see {log}: {(lines or [''])[-1]}")
    os.replace(partial, output)


@torch.no_grad()
def put_weights(model: nn.Module, weights: Path, wanted: Sequence[str]) -> None:
    """Copy dequantized weights into the linears `wanted` of the model; MorphoQuantError if the file has others."""
    found: dict[str, Tensor] = load_file(weights)
    if set(found) != set(wanted):
        name = min(set(found) ^ set(wanted))
        raise MorphoQuantError(f"{weights}: its linears are not those of the decoder ('{name}'); delete it")
    for name, weight in found.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(weight)
