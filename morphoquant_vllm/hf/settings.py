"""Settings of a loaded model: served numbers or exact mode, and which row serves which token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.token_table import rows_of_ids
from morphoquant_vllm.hf.experts import MorphoQuantExperts
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear

# Value of `row` in `configure`: each token takes the row of its modality.
TOKEN_ROWS = "token"


def configure(
    model: PreTrainedModel, *, exact: bool | None = None, row: str | None = None, reference: bool | None = None
) -> None:
    """Change the mode of a loaded MorphoQuant model from its next forward pass on; None keeps a setting.

    exact: whether masked values that leave the 4-bit grid bypass it unrounded (the oracle) instead of taking an 8-bit
    code; always on the torch reference. reference: whether the torch reference computes the quantized linears instead
    of the device's kernels. It defines the numbers and is slow. The kernels differ by no more than the documented
    bound. row: the name of the row that serves every token, or "token". With "token" each token takes the row of its
    modality, by the checkpoint's placeholder_token_ids. After loading, row is "token" if the checkpoint has such ids,
    else "any", as in vLLM. Massive tokens always take the massive row, and a tower's patches their fixed row.
    Raises MorphoQuantError for a model without a quantized layer, and for an unknown row.
    """
    mode, spec = _mode_and_spec(model)
    if exact is not None:
        mode.exact = exact
    if reference is not None:
        mode.reference = reference
    if row is None:
        return
    if row != TOKEN_ROWS and row not in spec.rows:
        raise MorphoQuantError(f"row '{row}' is unknown; choose '{TOKEN_ROWS}' or one of {list(spec.rows)}")
    for hook in mode.hooks:
        hook.remove()
    mode.hooks, mode.running.modality = [], None
    mode.row = spec.any_row if row == TOKEN_ROWS else spec.rows.index(row)
    if row == TOKEN_ROWS:
        mode.hooks = _watch_tokens(model, mode, spec)


def _watch_tokens(model: PreTrainedModel, mode: Mode, spec: QuantizationSpec) -> list[RemovableHandle]:
    """Hooks that note the rows of each forward pass when its token ids are embedded."""
    # A full omni model has no embedding; its thinker has.
    decoder = getattr(model, "thinker", model)
    embedding = decoder.get_input_embeddings()
    name = next(name for name, module in decoder.named_modules() if module is embedding)
    # A caller may run an inner module by itself: the pass begins and ends with the outermost one that runs.
    parts = name.split(".")
    around = [decoder.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    # Partial functions of `mode`, not closures: a copy of the model gets hooks of the copied mode.
    hooks = [module.register_forward_pre_hook(partial(_enter, mode)) for module in around]
    hooks += [module.register_forward_hook(partial(_leave, mode), always_call=True) for module in around]
    note = partial(_note, mode, spec.placeholder_token_ids, spec.rows)
    return [*hooks, embedding.register_forward_pre_hook(note)]


@torch.compiler.disable
def _enter(mode: Mode, *_: Any) -> None:
    """Before a module around the embedding: a pass that begins has no tokens yet."""
    if mode.running.depth == 0:
        mode.running.modality = None
    mode.running.depth += 1


@torch.compiler.disable
def _leave(mode: Mode, *_: Any) -> None:
    """After it, or after its error."""
    mode.running.depth -= 1
    if mode.running.depth == 0:
        mode.running.modality = None


@torch.compiler.disable
def _note(
    mode: Mode,
    placeholder_token_ids: Mapping[str, Sequence[int]],
    rows: Sequence[str],
    module: nn.Module,
    inputs: tuple[Any, ...],
) -> None:
    """Before the embedding: note the rows, unless the caller embeds tokens outside a pass, for whatever use."""
    if mode.running.depth:
        mode.running.modality = rows_of_ids(inputs[0], placeholder_token_ids, rows).flatten()


def _mode_and_spec(model: PreTrainedModel) -> tuple[Mode, QuantizationSpec]:
    for module in model.modules():
        if isinstance(module, (MorphoQuantLinear, MorphoQuantExperts)):
            return module.mode, module.spec
    raise MorphoQuantError(f"{type(model).__name__} holds no MorphoQuant layer; load it from a MorphoQuant checkpoint")
