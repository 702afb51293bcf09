"""Loads the decoder blocks of the source model, one at a time."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Collection
from typing import Protocol

import torch
from torch import nn

from calibration.model.architectures import Architecture
from calibration.model.buffers import compute_buffers
from calibration.model.experts import StoredExperts, find_experts, load_merged, merged_parameter
from calibration.model.fp8 import is_serving_only
from calibration.model.loading import choose_device, empty_model
from calibration.model.plan import DecoderNames
from calibration.model.source import Source
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError

# Files of older versions of transformers hold them in each block, and they are computed: rotary frequencies, and masks
# of GPT's attention.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")


class Blocks(Protocol):
    """The decoder's blocks, loaded one at a time, in any order, and again."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> nn.Module:
        """One block with its weights, on the device on which it runs; only the caller holds a reference."""


class BlockLoader:
    """The decoder blocks of a source model; a block's weights are read from the files when it is loaded."""

    def __init__(
        self,
        architecture: Architecture,
        source: Source,
        names: DecoderNames,
        recipe: Recipe,
        device: torch.device | None = None,
    ) -> None:
        """Create the blocks on the meta device; `device` None means the recipe's.

        Raises MorphoQuantError naming the first tensor that the files lack or that nothing reads, or of another shape.
        """
        self._source, self._names = source, names
        self._device = device or choose_device(recipe.device)
        model = empty_model(architecture, source, recipe)
        self._blocks = list(model.get_submodule(architecture.block_module).children())
        further = names.layer(len(self._blocks), "")
        for stored in source.tensors:
            if stored.startswith(further):
                raise MorphoQuantError(
                    f"{source.directory}: config.json asks for {len(self._blocks)} decoder blocks, but the weights "
                    f"hold {stored}; download the model again"
                )
        # By block: its lists of experts that transformers holds in another form than the files.
        self._experts = [self._merged_experts(architecture, index) for index in range(len(self._blocks))]
        for index, block in enumerate(self._blocks):
            compute_buffers(model, block)
            # Parameters, and the buffers that files hold.
            for name, parameter in block.state_dict().items():
                experts = self._experts[index].get(merged_parameter(name) or "")
                self._check_stored(architecture, names.layer(index, name), tuple(parameter.shape), experts)
            self._check_read(architecture, index, model._keys_to_ignore_on_load_unexpected or ())

    def _merged_experts(self, architecture: Architecture, index: int) -> dict[str, StoredExperts]:
        found = {}
        for name in self._blocks[index].state_dict():
            parent = merged_parameter(name)
            # Unknown experts are taken as they lie there, if they do.
            if parent is None or (not architecture.experts and self._names.layer(index, name) in self._source.tensors):
                continue
            experts = find_experts(self._names.layer(index, parent), self._source.tensors)
            if experts is not None:
                found[parent] = experts
        return found

    def _check_stored(
        self, architecture: Architecture, stored: str, wanted: tuple[int, ...], experts: StoredExperts | None
    ) -> None:
        """Refuse a parameter of the shape `wanted` that the files lack or hold in another shape."""
        info = self._source.tensors.get(stored)
        if experts is not None:
            shape: tuple[int, ...] | None = experts.merged_shape(stored)
        else:
            shape = None if info is None else info.shape
        if shape is None:
            raise MorphoQuantError(f"{self._source.directory}: the weights lack {stored}; download the model again")
        if shape != wanted:
            raise MorphoQuantError(
                f"{self._source.directory}: transformers cannot load it as {architecture.model_class} ({stored} is "
                f"{list(shape)} in the files, but {list(wanted)} by config.json)"
            )

    def _check_read(self, architecture: Architecture, index: int, ignored: Collection[str]) -> None:
        """Refuse a tensor of a block that nothing reads; `ignored` are patterns of those that transformers leaves out.

        Calibration would run another model than the files', and vLLM would refuse the tensor, or read it.
        """
        block = self._blocks[index]
        read = {self._names.layer(index, name) for name in (*block.state_dict(), *dict(block.named_buffers()))}
        read |= {name for experts in self._experts[index].values() for name in experts.tensors}
        for stored in self._source.tensors:
            if not stored.startswith(self._names.layer(index, "")) or stored in read or is_serving_only(stored):
                continue
            if not any(re.search(pattern, stored) for pattern in (*ignored, *_OLD_BUFFERS)):
                raise MorphoQuantError(
                    f"{self._source.directory}: {stored} is in the files, but {architecture.model_class} has no such "
                    "tensor by config.json; correct config.json (as attention_bias), or remove the tensor"
                )

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        """One block with its weights; MorphoQuantError if a file is damaged."""
        # The previous block, and the model that ran before the first, contain reference cycles (accelerate's hooks).
        # Without this call, Python would free their gigabytes only at its next collection.
        gc.collect()
        block = self._blocks[index]
        weights = {}
        for name, parameter in block.state_dict().items():
            experts = self._experts[index].get(merged_parameter(name) or "")
            if experts is not None:
                weights[name] = load_merged(self._source, experts, name, self._device, parameter.dtype)
                continue
            stored = self._source.load(self._names.layer(index, name))
            # A copy outside the mapped file, whose alignment depends on the file: products of differently aligned
            # tensors can differ in their last bits.
            weights[name] = stored.to(self._device, parameter.dtype, copy=True)
        filled = copy.deepcopy(block)
        filled.load_state_dict(weights, assign=True)
        # Computed buffers, which are on the CPU; the weights are there already.
        return filled.to(self._device).requires_grad_(False)
