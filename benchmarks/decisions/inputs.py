"""Inputs of linears to measure on: those of real decoder blocks, and generated ones as wide as a 7B model's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.decoder import architecture_of, blocks_of, linears_of, load
from calibration.model.architectures import SharedInput
from calibration.quantize.massive_tokens import outlying_tokens
from calibration.quantize.observation import InputReached
from morphoquant_vllm.errors import MorphoQuantError

# The generated input: correlated channels (few directions, falling strength) plus noise, each of its own size.
DIRECTIONS, DIRECTION_DECAY, NOISE = 96, 0.97, 0.5
# Student-t with few degrees of freedom: long tails that still have a variance.
TAIL_FREEDOM = 4
CHANNEL_SPREAD = 0.5
OUTLIER_CHANNELS, OUTLIER_FACTORS = 8, (20.0, 60.0)


@dataclass(frozen=True)
class LinearInput:
    """The inputs of linears that share one: tokens for calibration, and other tokens for measurement; all float32."""

    name: str
    # Index of the decoder block, for real inputs.
    block: int | None
    parallel: str
    # [N, K] by layer name.
    weights: dict[str, Tensor]
    # [T, K]; and which tokens have an outlying residual stream, bool [T].
    calibration: Tensor
    calibration_outlying: Tensor
    held_out: Tensor
    held_out_outlying: Tensor

    @property
    def in_features(self) -> int:
        return self.calibration.shape[1]


@torch.no_grad()
def real_inputs(
    directory: Path,
    indices: Sequence[int],
    calibration: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
) -> list[LinearInput]:
    """The shared inputs of the decoder blocks `indices` of a 16-bit model run on two sets of windows of token ids.

    MorphoQuantError if the model has no such block.
    """
    model = load(directory)
    blocks = blocks_of(model, directory)
    if max(indices) >= len(blocks):
        raise MorphoQuantError(
            f"block {max(indices)}: {directory} has blocks 0 to {len(blocks) - 1}; choose from those"
        )
    shared_inputs = architecture_of(directory)[0].shared_inputs
    sets = [_run(model, blocks, indices, shared_inputs, windows) for windows in (calibration, held_out)]
    return [
        LinearInput(
            name=f"blocks.{index}.{shared.name}",
            block=index,
            parallel=shared.parallel,
            weights={
                f"blocks.{index}.{name}": linears_of(blocks[index])[name].weight.detach() for name in shared.shards
            },
            calibration=sets[0][index, shared.name],
            calibration_outlying=_outlying(sets[0][index, "norm"]),
            held_out=sets[1][index, shared.name],
            held_out_outlying=_outlying(sets[1][index, "norm"]),
        )
        for index in indices
        for shared in shared_inputs
    ]


def _outlying(norms: Tensor) -> Tensor:
    return outlying_tokens(norms, torch.zeros_like(norms, dtype=torch.int32))


def _run(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    indices: Sequence[int],
    shared_inputs: Sequence[SharedInput],
    windows: Sequence[Sequence[int]],
) -> dict[tuple[int, str], Tensor]:
    """Inputs [T, K] by block and name of the shared input; under "norm" the block's larger residual norm [T]."""
    seen: dict[tuple[int, str], list[Tensor]] = {(i, name.name): [] for i in indices for name in shared_inputs}
    seen |= {(index, "norm"): [] for index in indices}

    def before(key: tuple[int, str], module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[key].append(inputs[0].flatten(0, -2))

    def after(index: int, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        norms = (field.norm(dim=-1).flatten() for field in (inputs[0], hidden))
        seen[index, "norm"].append(torch.maximum(*norms))
        if index == max(indices):
            raise InputReached

    handles = [blocks[index].register_forward_hook(partial(after, index)) for index in indices]
    for index in indices:
        for shared in shared_inputs:
            linear = blocks[index].get_submodule(shared.shards[0])
            handles.append(linear.register_forward_pre_hook(partial(before, (index, shared.name))))
    try:
        for ids in windows:
            with suppress(InputReached):
                model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def generated_input(in_features: int, out_features: int, tokens: int, held_out: int, seed: int) -> LinearInput:
    """A layer of any size with correlated channels, long tails and a few channels 20 to 60 times larger."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    strength = DIRECTION_DECAY ** torch.arange(DIRECTIONS)
    mixing = normal(DIRECTIONS, in_features) * (strength / strength.norm())[:, None]
    size = (CHANNEL_SPREAD * normal(in_features)).exp()
    low, high = OUTLIER_FACTORS
    outliers = torch.randperm(in_features, generator=generator)[:OUTLIER_CHANNELS]
    size[outliers] *= torch.empty(outliers.numel()).uniform_(low, high, generator=generator)
    noise = normal(tokens + held_out, in_features)
    chi_square = torch.zeros_like(noise)
    for _ in range(TAIL_FREEDOM):
        chi_square += normal(*noise.shape).square_()
    noise.div_(chi_square.div_(TAIL_FREEDOM).sqrt_())
    x = (normal(tokens + held_out, DIRECTIONS) @ mixing + NOISE * noise) * size
    ordinary = torch.zeros(tokens + held_out, dtype=torch.bool)
    return LinearInput(
        name=f"generated.{in_features}x{out_features}",
        block=None,
        parallel="column",
        weights={f"generated.{in_features}x{out_features}": normal(out_features, in_features) / in_features**0.5},
        calibration=x[:tokens],
        calibration_outlying=ordinary[:tokens],
        held_out=x[tokens:],
        held_out_outlying=ordinary[tokens:],
    )
