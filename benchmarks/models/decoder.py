"""The decoder blocks of a transformers model in order: their inputs and their linears."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.model.architectures import Architecture, find_architecture
from morphoquant_vllm.format.schema import DEFAULT_ROWS

# Longest conversation of the benchmarks.
MAX_TOKENS = 4096


@dataclass
class BlockInput:
    """One sample before a block: hidden states [1, M, hidden] and the other arguments of each block."""

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input, by their names below the block."""

    names: tuple[str, ...]
    # One [M, K] per sample; of an expert, one per sample with tokens that chose it.
    inputs: list[Tensor]


def architecture_of(directory: Path) -> tuple[Architecture, dict[str, Any]]:
    """Calibration's architecture of the model in `directory`, and its config.json."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return find_architecture(config), config


def load(directory: Path) -> nn.Module:
    """The model that calibration sees (an omni model's thinker), in float32."""
    model_class = getattr(transformers, architecture_of(directory)[0].model_class)
    model: nn.Module = model_class.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval()


def blocks_of(model: nn.Module, directory: Path) -> list[nn.Module]:
    """The decoder blocks of `load(directory)`."""
    return list(model.get_submodule(architecture_of(directory)[0].block_module).children())


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by their names below it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def calibration_inputs(
    directory: Path, data: Sequence[Path], window_tokens: int, max_samples: int
) -> list[dict[str, Tensor]]:
    """Model inputs of calibration files, each a batch of one: the samples that `morphoquant calibrate` uses."""
    architecture, config = architecture_of(directory)
    samples = build_samples(
        directory,
        load_conversations(data),
        max_tokens=MAX_TOKENS,
        max_samples=max_samples,
        window_tokens=window_tokens,
        placeholder_token_ids=architecture.placeholder_token_ids(config),
        rows=DEFAULT_ROWS,
    )
    return [sample.inputs for sample in samples]


@torch.no_grad()
def capture(model: Any, blocks: Sequence[nn.Module], samples: Sequence[dict[str, Tensor]]) -> list[BlockInput]:
    """Run everything before the blocks on each sample; blocks and lm_head do not run."""
    head, model.lm_head = model.lm_head, nn.Identity()
    captured = []

    def record(index: int, entry: BlockInput) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if index == 0:
                entry.hidden = hidden_states
            entry.arguments.append(arguments)
            return hidden_states

        return forward

    try:
        for sample in samples:
            entry = BlockInput()
            for index, block in enumerate(blocks):
                # An attribute of the instance hides the class's method.
                block.forward = record(index, entry)
            model(**sample, use_cache=False)
            captured.append(entry)
    finally:
        model.lm_head = head
        for block in blocks:
            block.__dict__.pop("forward", None)
    return captured


@torch.no_grad()
def run(block: nn.Module, index: int, entries: Sequence[BlockInput]) -> list[Tensor]:
    """Outputs of block number `index` on each sample."""
    outputs = [block(entry.hidden, **entry.arguments[index]) for entry in entries]
    return [output if isinstance(output, Tensor) else output[0] for output in outputs]


def observe(block: nn.Module, index: int, entries: Sequence[BlockInput]) -> tuple[list[Group], list[Tensor]]:
    """Run a block: its linears with their inputs, grouped by the input they share, and its outputs."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(inputs[0])

    handles = [linear.register_forward_pre_hook(partial(note, name)) for name, linear in linears_of(block).items()]
    try:
        outputs = run(block, index, entries)
    finally:
        for handle in handles:
            handle.remove()
    shared: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in seen.items():
        # Every linear of a group gets the same object as input.
        shared.setdefault(tuple(id(x) for x in inputs), []).append(name)
    groups = [Group(tuple(names), [x.flatten(0, -2) for x in seen[names[0]]]) for names in shared.values()]
    # Experts that no token chose.
    groups += [Group((name,), []) for name in linears_of(block) if name not in seen]
    return groups, outputs
