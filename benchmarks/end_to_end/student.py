"""A checkpoint's linears with gradients: rounding and weights' codes are straight-through, rows and masks are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import decoder
from calibration.learn.linear import RoundInput
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import TWO_LEVEL_SCHEME
from morphoquant_vllm.hf import MorphoQuantLinear
from morphoquant_vllm.numerics.activation import escapes, is_massive
from morphoquant_vllm.numerics.weights import INT4_MAX, INT4_MIN, integer_codes

# Largest distance of a latent code from its code at the start.
DITHER = 0.49


class Product(torch.autograd.Function):
    """codes [M, K] times the weights q * level [N, K] of latent codes; bfloat16 products make the gradients.

    levels [N, K/G] are those of groups. The gradient of `latent` passes its rounding to q, if it lies within 4 bits.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, latent: Tensor, levels: Tensor) -> Tensor:
        weights = integers(latent).unflatten(1, (levels.shape[1], -1)).mul_(levels[..., None]).flatten(1)
        ctx.save_for_backward(codes, latent, levels, weights)
        return codes @ weights.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, latent, levels, weights = ctx.saved_tensors
        of_output = gradients[0].bfloat16()
        of_latent = None
        if ctx.needs_input_grad[1]:
            of_weights = (of_output.T @ codes.bfloat16()).float().unflatten(1, (levels.shape[1], -1))
            of_latent = of_weights.mul_(levels[..., None]).flatten(1)
            of_latent.masked_fill_((latent < INT4_MIN - 0.5) | (latent > INT4_MAX + 0.5), 0.0)
        return (of_output @ weights.bfloat16()).float(), of_latent, None


def integers(latent: Tensor) -> Tensor:
    """The codes, as floats, of latent codes."""
    return latent.round().clamp_(INT4_MIN, INT4_MAX)


class StudentInput(nn.Module):
    """The quantizer of one input. Linears that share the input share its codes."""

    def __init__(self, linear: MorphoQuantLinear) -> None:
        super().__init__()
        self.record = linear.activation()
        rows = [linear.mode.row, self.record.gain.numel() - 1]
        # The ordinary row and that of massive tokens.
        fields = {name: getattr(self.record, name)[rows] for name in ("inverse", "centre", "mask", "gain")}
        self.two_rows = self.record._replace(**fields)
        self.gain = self.two_rows.gain
        # Logarithm of the factor of each step, in natural channel order.
        self.change = nn.Parameter(torch.zeros(self.record.inverse.shape[1]))
        self.escaped = self.counted = 0
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes float32 [M, K] in channel order, and the massive tokens, int64; x [..., K]."""
        if self._last is None or self._last[0] is not x:
            flat = x.reshape(-1, x.shape[-1])
            record = self.record
            massive = is_massive(flat.detach(), record.massive_channel, record.massive_low, record.massive_high)
            places = massive.nonzero().flatten()
            codes = RoundInput.apply(flat, self.change, self.two_rows, massive.int())
            self.escaped += int(escapes(codes.detach()).sum())
            self.counted += codes.numel()
            self._last = x, codes, places
        return self._last[1:]

    def forget(self) -> None:
        """Free the last codes, and count escapes anew."""
        self._last, self.escaped, self.counted = None, 0, 0


class StudentLinear(nn.Module):
    """A linear of a checkpoint that computes as the torch reference, in float32, and learns."""

    def __init__(self, linear: MorphoQuantLinear, given: StudentInput, generator: torch.Generator) -> None:
        super().__init__()
        weight = linear.weights()
        # A list hides the module, which several linears share.
        self.given = [given]
        codes = integer_codes(weight.codes).float()
        # Anywhere in the interval that rounds to the code. So few weights change their codes in one step.
        self.latent = nn.Parameter(codes + DITHER * (2 * torch.rand(codes.shape, generator=generator) - 1))
        two_level = linear.spec.layers[linear.name].scale_scheme == TWO_LEVEL_SCHEME
        self.levels = weight.scale.float()
        self.scale = weight.channel_scale if two_level else torch.ones(self.latent.shape[0])
        # Logarithm of the factor of each output's scale, and what is added to the constant of the ordinary row.
        self.change = nn.Parameter(torch.zeros(self.latent.shape[0]))
        self.offset = nn.Parameter(torch.zeros(self.latent.shape[0]))
        rows = [linear.mode.row, given.record.gain.numel() - 1]
        constant = weight.absorbed_bias[rows]
        self.constant = constant if linear.bias is None else constant + linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        codes, massive = self.given[0](x)
        gain = self.given[0].gain
        y = Product.apply(codes, self.latent, self.levels) * (self.scale * self.change.exp())
        special = y[massive] * gain[1] + self.constant[1]
        y = (y * gain[0] + (self.constant[0] + self.offset)).index_copy(0, massive, special)
        return y.view(*x.shape[:-1], -1)


def load_student(checkpoint: Path) -> tuple[nn.Module, list[StudentInput]]:
    """A checkpoint whose quantized linears learn while all else is fixed, and its inputs.

    MorphoQuantError if a linear is not quantized to 4 bits, or if the checkpoint has experts.
    """
    model = decoder.load(checkpoint)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, MorphoQuantLinear)}
    wide = [name for name, linear in linears.items() if linear.spec.layers[linear.name].weight_bits != 4]
    if not linears or wide or any(linear.spec.experts for linear in linears.values()):
        found = f"{wide[0]} has 8-bit weights" if wide else "it has experts, or no quantized linear"
        raise MorphoQuantError(f"{checkpoint}: cannot learn ({found}); give a checkpoint of 4-bit linears")
    model.requires_grad_(False)
    inputs: dict[str, StudentInput] = {}
    generator = torch.Generator().manual_seed(0)
    for name, linear in linears.items():
        shared = linear.spec.layers[linear.name].shared_input
        if shared not in inputs:
            inputs[shared] = StudentInput(linear)
        model.set_submodule(name, StudentLinear(linear, inputs[shared], generator))
    return model, list(inputs.values())
