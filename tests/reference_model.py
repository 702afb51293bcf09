"""A transformers model whose linears are the torch reference, loaded from a checkpoint's own files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from morphoquant_vllm.format.checkpoint import check_headers, load_experts, load_layer, read_spec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.token_table import rows_of_ids
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts
from morphoquant_vllm.numerics.linear import linear
from tests.experts import record_of
from tests.records import activation_of, weight_of


class StepRows:
    """Row of each token that a model embeds: by its modality, or 'any' for all if `by_modality` is not set."""

    def __init__(self, spec: QuantizationSpec, by_modality: bool) -> None:
        self.spec = spec
        self.by_modality = by_modality and bool(spec.placeholder_token_ids)
        self.rows = torch.empty(0, dtype=torch.int32)

    def see(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Pre-hook of the model's token embedding."""
        ids = inputs[0].flatten()
        self.rows = torch.full(ids.shape, self.spec.any_row, dtype=torch.int32)
        if self.by_modality:
            self.rows = rows_of_ids(ids, self.spec.placeholder_token_ids, self.spec.rows)


class ReferenceLinear(nn.Module):
    """One quantized linear as numerics.linear defines it; a layer with a fixed row has it for all of its tokens."""

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None, step: StepRows, fixed_row: str) -> None:
        super().__init__()
        self.weight_record = weight_of(tensors)
        self.activation_record = activation_of(tensors)
        self.bias = bias
        self.step = step
        self.fixed_row = fixed_row

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = self.step.rows
        if self.fixed_row:
            rows = torch.full(flat.shape[:1], self.step.spec.rows.index(self.fixed_row), dtype=torch.int32)
        y = linear(flat, rows, self.weight_record, self.activation_record, self.bias)
        return y.view(*x.shape[:-1], -1)


class ReferenceExperts(nn.Module):
    """The experts of a block as numerics.experts defines them."""

    def __init__(self, experts: ExpertsRecord, step: StepRows) -> None:
        super().__init__()
        self.experts, self.step = experts, step

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts(hidden_states, self.step.rows, top_k_weights.float(), top_k_index, self.experts)


class Checkpoint:
    """A checkpoint's settings and layers, read from its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec: QuantizationSpec = read_spec(directory)
        self._files = check_headers(directory, self.spec)

    def layer(self, name: str) -> dict[str, Tensor]:
        """Stored tensors of a layer, with the source layer's bias if it has one."""
        return load_layer(self.directory, self._files, name, self.spec)

    def experts(self, name: str) -> ExpertsRecord:
        """The record of a list of experts."""
        tensors = [tensors for _, tensors in load_experts(self.directory, self._files, name, self.spec)]
        return record_of([tuple(tensors[first : first + 3]) for first in range(0, len(tensors), 3)])


def swap_linears(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored_prefix: str = "",
    module_prefix: str = "",
    by_modality: bool = True,
    tower_prefix: str = "",
) -> nn.Module:
    """Swap every quantized linear and list of experts of a float32 transformers model for the reference, in place.

    Layers are stored under `stored_prefix` + x and are modules `module_prefix` + x; those stored under another name x
    are modules `tower_prefix` + x. One sequence at a time.
    """
    step = StepRows(checkpoint.spec, by_modality)
    model.get_input_embeddings().register_forward_pre_hook(step.see)
    for name, layer in checkpoint.spec.layers.items():
        inside = name.startswith(stored_prefix)
        module = module_prefix + name.removeprefix(stored_prefix) if inside else tower_prefix + name
        bias = model.get_submodule(module).bias
        model.set_submodule(module, ReferenceLinear(checkpoint.layer(name), bias, step, layer.fixed_row))
    for name in checkpoint.spec.experts:
        module = module_prefix + name.removeprefix(stored_prefix)
        model.set_submodule(module, ReferenceExperts(checkpoint.experts(name), step))
    return model.eval()


def reference_thinker(source: Path, checkpoint: Checkpoint, by_modality: bool = True) -> nn.Module:
    """The float32 thinker of the Qwen2.5-Omni in `source`, its quantized linears swapped for the reference."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return swap_linears(model, checkpoint, "thinker.", by_modality=by_modality)
