"""A checkpoint in transformers, on the torch reference: all of it, or one part of it in the 16-bit model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy.methods import KINDS
from benchmarks.models import decoder
from morphoquant_vllm.hf import MorphoQuantLinear, configure
from morphoquant_vllm.numerics.activation import act_quant, dequantize, token_rows

ACTIVATIONS, WEIGHTS = "activations", "weights"


class CodedActivations(nn.Module):
    """A linear of 16-bit weights whose input is decoded from the codes of a quantized one."""

    def __init__(self, quantized: MorphoQuantLinear, original: nn.Linear) -> None:
        super().__init__()
        self.quantized, self.original = quantized, original

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], float32."""
        flat = x.reshape(-1, x.shape[-1])
        record = self.quantized.activation()
        rows = token_rows(flat, self.quantized.modality_of(flat), record)
        seen = torch.empty_like(flat)
        seen[:, record.channel_order.long()] = dequantize(act_quant(flat, rows, record), rows, record)
        y: Tensor = self.original(seen)
        return y.view(*x.shape[:-1], -1)


class ServedWeights(nn.Module):
    """A quantized linear whose inputs are not rounded: nothing but its weights has 4 bits."""

    def __init__(self, quantized: MorphoQuantLinear) -> None:
        super().__init__()
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], float32."""
        flat = x.reshape(-1, x.shape[-1])
        record, weights = self.quantized.activation(), self.quantized.weights()
        rows = token_rows(flat, self.quantized.modality_of(flat), record).long()
        ordered = flat.index_select(1, record.channel_order.long())
        inputs = (ordered - record.centre[rows]) * record.inverse[rows]
        y = inputs @ weights.dequantized().T * record.gain[rows, None] + weights.absorbed_bias[rows]
        if self.quantized.bias is not None:
            y += self.quantized.bias
        return y.view(*x.shape[:-1], -1)


def load(checkpoint: Path) -> nn.Module:
    """The quantized model (an omni model's thinker) as transformers loads it, in float32."""
    model = decoder.load(checkpoint)
    # The 16-bit model is served as well, and has none.
    if any(isinstance(module, MorphoQuantLinear) for module in model.modules()):
        configure(model, reference=True)
    return model


def load_part(checkpoint: Path, source: Path, part: str) -> nn.Module:
    """The 16-bit model of `source` with one part of `checkpoint`, see methods.Part."""
    model, original = load(checkpoint), decoder.load(source)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, MorphoQuantLinear)}
    for name, module in quantized.items():
        own = original.get_submodule(name)
        assert isinstance(own, nn.Linear)
        if part == WEIGHTS:
            model.set_submodule(name, ServedWeights(module))
        elif part == ACTIVATIONS:
            model.set_submodule(name, CodedActivations(module, own))
        elif not name.endswith(KINDS[part]):
            model.set_submodule(name, own)
    return model
