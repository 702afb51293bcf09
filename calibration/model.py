"""The source model in memory, and its decoder blocks' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.recipe import Recipe
from calibration.samples import Sample
from calibration.source import Source
from morphoquant_vllm.errors import MorphoQuantError

_LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@dataclass
class BlockInput:
    """One sample on its way through the decoder: its hidden states before the next block, on the CPU."""

    modality: Tensor
    positions: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    # The same, after the quantized blocks.
    served: Tensor = field(default_factory=lambda: torch.empty(0))
    # What the model passes to each block besides the hidden states (positions, mask), by reference.
    arguments: list[dict[str, Any]] = field(default_factory=list)


def choose_device(name: str) -> torch.device:
    """The device of a recipe; "auto" is cuda where there is one. MorphoQuantError where torch does not know it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch built without CUDA reports it as an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise MorphoQuantError(f"device = '{name}' is not usable here; use cpu, or leave it at auto") from error
    if device.type not in ("cpu", "cuda"):
        raise MorphoQuantError(f"device = '{name}' is not supported; use cpu or cuda")
    return device


def load_model(architecture: Architecture, source: Source, recipe: Recipe) -> nn.Module:
    """Load the source with transformers, without running code of its own; MorphoQuantError where that fails."""
    model_class = getattr(transformers, architecture.model_class)
    try:
        model, loading = model_class.from_pretrained(
            str(source.directory),
            dtype=getattr(torch, recipe.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    # A config of the wrong types or sizes fails in any of these ways, deep inside.
    except (*_LOADING_ERRORS, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MorphoQuantError(
            f"{source.directory}: transformers cannot load it as {architecture.model_class} ({reason})"
        ) from error
    if loading["missing_keys"]:
        raise MorphoQuantError(
            f"{source.directory}: the weights lack {min(loading['missing_keys'])}; download the model again"
        )
    return model.to(choose_device(recipe.device)).eval()


@torch.no_grad()
def capture_block_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], samples: Sequence[Sample], positions: Sequence[Tensor]
) -> list[BlockInput]:
    """Run embeddings and towers on every sample and keep what reaches the decoder blocks.

    The blocks themselves are skipped (what they pass on does not change what else the next one is given), and so
    is the lm_head. `positions` are each sample's sampled tokens. Raises MorphoQuantError naming the sample where a
    token id has no row in the embedding.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    model.lm_head = nn.Identity()
    _check_token_ids(model, samples)
    captured = []
    for sample, chosen in zip(samples, positions, strict=True):
        entry = BlockInput(sample.modality, chosen)
        with skipped_blocks(blocks, entry):
            model(**_to_model(sample.inputs, device, dtype), use_cache=False)
        captured.append(entry)
    return captured


def _check_token_ids(model: Any, samples: Sequence[Sample]) -> None:
    rows = model.get_input_embeddings().num_embeddings
    for sample in samples:
        largest = int(sample.inputs["input_ids"].max())
        if largest >= rows:
            raise MorphoQuantError(
                f"{sample.source}: token id {largest}, but the model's embedding has {rows} rows; "
                "the tokenizer belongs to another model: copy this model's own into its directory"
            )


@contextmanager
def skipped_blocks(blocks: Sequence[nn.Module], entry: BlockInput) -> Iterator[None]:
    """Make the blocks record what they are given in `entry` and pass the hidden states on unchanged."""

    def record(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            if index == 0:
                entry.hidden = entry.served = hidden_states.cpu()
            entry.arguments.append(arguments)
            return hidden_states

        return forward

    for index, block in enumerate(blocks):
        # An attribute of the instance hides the class's method and leaves the module's hooks and flags alone.
        block.forward = record(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _to_model(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move inputs to the device; pixels and audio features also take the dtype, lists of seconds keep theirs."""
    return {
        name: value.to(device, dtype) if value.is_floating_point() and value.dim() > 1 else value.to(device)
        for name, value in inputs.items()
    }
