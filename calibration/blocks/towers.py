"""Quantizes the towers of a recipe: their blocks are quantized like the decoder's, on patches of the data's media.

A tower's patches have no token ids: one row, named by the layers' fixed_row, serves all of them. The image tower of
Qwen's models encodes pictures and video frames, so its statistics cover both.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from calibration.blocks.capture import MemoryInput, skipped_blocks
from calibration.blocks.loop import calibrate_blocks
from calibration.blocks.results import BlockResult
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.data.rendering import Sample
from calibration.data.token_choice import DrawnTokens, share_tokens
from calibration.model.architectures import Architecture, Tower
from calibration.model.plan import tower_names, unfit_linears
from calibration.model.source import Source
from calibration.processes import ONE, Processes
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec

logger = logging.getLogger(__name__)

# The processor's outputs for the image tower, by the medium's row: patches, and their numbers in time, height and
# width, [media, 3].
_PATCHES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@dataclass(frozen=True)
class _Medium:
    """The pictures, or the videos, of one sample: one run of the tower."""

    row: str
    # Names of the processor's outputs among the sample's inputs.
    patches: str
    grid: str
    inputs: Mapping[str, Tensor]
    # Index in the order of the data, over all processes.
    place: int


class _InModel:
    """Blocks of a model in memory; their quantized linears stay in the model."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        return self._blocks[index]


def check_media(samples: Sequence[Sample], recipe: Recipe, processes: Processes = ONE) -> None:
    """Raise MorphoQuantError if a tower is to be quantized and the data have no media for it."""
    for name in recipe.towers:
        if not any(processes.all_gather(bool(_media(samples)))):
            raise MorphoQuantError(
                f"towers: the calibration data have no image and no video for the {name} tower; add some, or leave the "
                "tower out"
            )


def calibrate_towers(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    architecture: Architecture,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
    processes: Processes = ONE,
) -> list[BlockResult]:
    """Quantize the towers that the recipe names; the results of their blocks, empty if it names none.

    Afterwards the model's towers compute the served outputs. `samples` are those of this process.
    """
    return [
        result
        for name in recipe.towers
        for result in _calibrate_tower(
            model, samples, architecture.tower(name), architecture, source, spec, recipe, processes
        )
    ]


def _media(samples: Sequence[Sample]) -> list[_Medium]:
    return [
        _Medium(row, patches, grid, sample.inputs, len(_PATCHES) * sample.place + index)
        for sample in samples
        for index, (row, (patches, grid)) in enumerate(_PATCHES.items())
        if patches in sample.inputs
    ]


def _calibrate_tower(
    model: nn.Module,
    samples: Sequence[Sample],
    tower: Tower,
    architecture: Architecture,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
    processes: Processes,
) -> list[BlockResult]:
    """Quantize one tower, in the model too."""
    if processes.first:
        _log_unfit_linears(tower, source, recipe)
    module = model.get_submodule(tower.module)
    blocks = list(model.get_submodule(tower.block_module).children())
    inputs, patches = _capture_media(module, blocks, _media(samples), spec, recipe, processes)
    # All patches take the fixed row, so modality rows would be unused. Towers do not learn, so no medium has to judge.
    settings = recipe.model_copy(update={"modality_rows": False, "effort": "fast"})
    results = []
    for result in calibrate_blocks(
        _InModel(blocks),
        inputs,
        patches,
        architecture=replace(architecture, shared_inputs=tower.shared_inputs),
        names=tower_names(tower, source.tensors),
        source=source,
        spec=spec,
        recipe=settings,
    ):
        loss = "-" if result.loss is None else f"{result.loss:.4f}"
        if processes.first:
            logger.info("%s tower: block %d/%d  loss %s", tower.name, result.index + 1, result.count, loss)
        results.append(result)
    serving = TokenRows(spec.rows.index(tower.name))
    for layer in module.modules():
        if isinstance(layer, ServedLinear):
            layer.serving = serving
    return results


def _capture_media(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    media: Sequence[_Medium],
    spec: QuantizationSpec,
    recipe: Recipe,
    processes: Processes,
) -> tuple[list[MemoryInput], DrawnTokens]:
    """The block inputs of each of this process's media, and the drawn patches of all processes."""
    rows = {
        medium.place: torch.full((int(medium.inputs[medium.grid].prod(-1).sum()),), spec.rows.index(medium.row)).int()
        for medium in media
    }
    patches = share_tokens(processes, rows, recipe.sample_tokens, recipe.modality_balance, recipe.seed)
    inputs = []
    for medium, index in zip(media, patches.samples, strict=True):
        entry = MemoryInput(rows[medium.place], patches.positions[index])
        _capture(module, blocks, medium, entry)
        inputs.append(entry)
    return inputs, patches


@torch.no_grad()
def _capture(module: nn.Module, blocks: Sequence[nn.Module], medium: _Medium, entry: MemoryInput) -> None:
    """Run the tower with skipped blocks and keep the blocks' inputs in `entry`."""
    parameter = next(module.parameters())
    with skipped_blocks(blocks, entry):
        patches, grid = (medium.inputs[name].to(parameter.device) for name in (medium.patches, medium.grid))
        module(patches.to(parameter.dtype), grid_thw=grid)


def _log_unfit_linears(tower: Tower, source: Source, recipe: Recipe) -> None:
    for name, in_features in unfit_linears(tower, source.tensors, recipe.group_size).items():
        logger.info(
            "%s tower: %s stays in 16 bit: its K = %d is not divisible by group_size %d",
            tower.name,
            name,
            in_features,
            recipe.group_size,
        )
