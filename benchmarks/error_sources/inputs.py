"""The inputs of the same linears in the 16-bit model and in the served one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import decoder
from calibration.model.architectures import SharedInput
from calibration.quantize.observation import InputReached
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.hf import MorphoQuantLinear

# Token ids of windows, by the name of their text.
Windows = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class PairedInput:
    """The linears of one input, and what they read."""

    name: str
    weights: list[Tensor]
    served: list[MorphoQuantLinear]
    # Inputs float32 [T, K] by text, in the 16-bit model and in the served one.
    exact: dict[str, Tensor]
    quantized: dict[str, Tensor]


def load_pair(source: Path, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
    """The 16-bit model and the served one, in float32; MorphoQuantError if the second is no checkpoint."""
    pair = decoder.load(source), decoder.load(checkpoint)
    if not any(isinstance(module, MorphoQuantLinear) for module in pair[1].modules()):
        raise MorphoQuantError(f"{checkpoint}: has no quantized linear; give a checkpoint of {source}")
    return pair


@torch.no_grad()
def paired_inputs(source: Path, pair: tuple[nn.Module, nn.Module], block: int, windows: Windows) -> list[PairedInput]:
    """The inputs of one decoder block's linears on these windows.

    MorphoQuantError if there is no such block, or if a linear of it is not quantized.
    """
    architecture = decoder.architecture_of(source)[0]
    prefix = f"{architecture.block_module}.{block}"
    for model in pair:
        count = len(decoder.blocks_of(model, source))
        if block >= count:
            raise MorphoQuantError(f"block {block}: {source} has blocks 0 to {count - 1}; choose one of those")
    seen = [_run(model, prefix, architecture.shared_inputs, windows) for model in pair]
    found = []
    for shared in architecture.shared_inputs:
        names = [f"{prefix}.{shard}" for shard in shared.shards]
        served = [module for name in names if isinstance(module := pair[1].get_submodule(name), MorphoQuantLinear)]
        if len(served) < len(names):
            raise MorphoQuantError(f"{names[0]}: not quantized in this checkpoint; choose another block")
        weights = [pair[0].get_parameter(f"{name}.weight").detach() for name in names]
        exact, quantized = ({text: values[text, shared.name] for text in windows} for values in seen)
        found.append(PairedInput(f"{block}.{shared.name}", weights, served, exact, quantized))
    return found


def _run(
    model: nn.Module, prefix: str, shared_inputs: Sequence[SharedInput], windows: Windows
) -> dict[tuple[str, str], Tensor]:
    """Inputs [T, K] of the block `prefix` by text and name of the shared input; later blocks do not run."""
    seen: dict[tuple[str, str], list[Tensor]] = {}
    running = ""

    def note(name: str, inputs: tuple[Any, ...]) -> None:
        seen.setdefault((running, name), []).append(inputs[0].flatten(0, -2).float())

    def stop(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        raise InputReached

    handles = [model.get_submodule(prefix).register_forward_hook(stop)]
    for shared in shared_inputs:
        first = model.get_submodule(f"{prefix}.{shared.shards[0]}")
        handles.append(first.register_forward_pre_hook(lambda module, inputs, name=shared.name: note(name, inputs)))
    try:
        for text, cut in windows.items():
            running = text
            for ids in cut:
                with suppress(InputReached):
                    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}
