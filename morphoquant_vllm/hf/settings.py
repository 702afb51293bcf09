"""Settings of a loaded model: served numbers or exact mode, and which row serves which token."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.token_table import token_rows
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
    mode.hooks, mode.token_rows = [], None
    mode.row = spec.any_row if row == TOKEN_ROWS else spec.rows.index(row)
    if row == TOKEN_ROWS:
        mode.hooks = _watch_tokens(model, mode, spec)


def _watch_tokens(model: PreTrainedModel, mode: Mode, spec: QuantizationSpec) -> list[RemovableHandle]:
    """Hooks that note the rows of each forward pass when its token ids are embedded."""
    # A full omni model has no embedding; its thinker has.
    decoder = getattr(model, "thinker", model)

    def forget(module: nn.Module, *_: Any) -> None:
        # A pass on embeddings that the caller made, or through an inner module, has tokens of unknown modality.
        mode.token_rows = None

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        mode.token_rows = token_rows(inputs[0], spec.placeholder_token_ids, spec.rows).flatten()

    embedding = decoder.get_input_embeddings()
    return [
        decoder.register_forward_pre_hook(forget),
        decoder.register_forward_hook(forget),
        embedding.register_forward_pre_hook(note),
    ]


def _mode_and_spec(model: PreTrainedModel) -> tuple[Mode, QuantizationSpec]:
    for module in model.modules():
        if isinstance(module, (MorphoQuantLinear, MorphoQuantExperts)):
            return module.mode, module.spec
    raise MorphoQuantError(f"{type(model).__name__} holds no MorphoQuant layer; load it from a MorphoQuant checkpoint")
