"""A transformers model whose linears are the torch reference, loaded from a checkpoint's own files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from calibration.served import TokenRows
from morphoquant_vllm.checkpoint import check_headers, load_layer, read_spec
from morphoquant_vllm.numerics.linear import linear
from morphoquant_vllm.schema import QuantizationSpec
from tests.records import activation_of, weight_of


class ReferenceLinear(nn.Module):
    """One quantized linear as numerics.linear defines it; `serving` says what row each token uses if not massive."""

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None, serving: TokenRows) -> None:
        super().__init__()
        self.weight_record = weight_of(tensors)
        self.activation_record = activation_of(tensors)
        self.bias = bias
        self.serving = serving

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        modality = torch.full((flat.shape[0],), self.serving.any_row, dtype=torch.int32)
        if self.serving.modality is not None:
            modality = self.serving.modality.int()
        y = linear(flat, modality, self.weight_record, self.activation_record, self.bias)
        return y.view(*x.shape[:-1], -1)


class Checkpoint:
    """A checkpoint's settings and layers, read from its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec: QuantizationSpec = read_spec(directory)
        self._files = check_headers(directory, self.spec)

    def layer(self, name: str) -> dict[str, Tensor]:
        """Stored tensors of a layer, its own bias included where it has one."""
        return load_layer(self.directory, self._files, name, self.spec)


def swap_linears(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored_prefix: str = "",
    module_prefix: str = "",
    serving: TokenRows | None = None,
) -> nn.Module:
    """Swap every quantized linear of a float32 transformers model for the reference, in place.

    Layers are stored under `stored_prefix` + x and are modules `module_prefix` + x. `serving` says what modality each
    token has; None: not known.
    """
    serving = serving or TokenRows(checkpoint.spec.any_row)
    for name in checkpoint.spec.layers:
        module = module_prefix + name.removeprefix(stored_prefix)
        bias = model.get_submodule(module).bias
        model.set_submodule(module, ReferenceLinear(checkpoint.layer(name), bias, serving))
    return model.eval()


def reference_thinker(source: Path, checkpoint: Checkpoint) -> nn.Module:
    """The float32 thinker of the Qwen2.5-Omni in `source`, its quantized linears swapped for the reference."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return swap_linears(model, checkpoint, "thinker.")
