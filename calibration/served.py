"""A quantized linear in the place of a model's own, so that later layers are calibrated on what will be served."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from morphoquant_vllm.numerics.activation import act_quant, activation_record, token_rows
from morphoquant_vllm.numerics.linear import weight_record
from morphoquant_vllm.numerics.weights import dequantize_weight
from morphoquant_vllm.schema import INPUT_TENSORS


class ServedLinear(nn.Module):
    """The integer layer of a checkpoint's tensors: the sums of numerics.linear in float32, for speed.

    `row` serves every token that is not massive.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None, row: int, device: torch.device) -> None:
        super().__init__()
        self.record = activation_record(*(tensors[name].to(device) for name in INPUT_TENSORS))
        per_row = {name: getattr(self.record, name)[row][None] for name in ("inverse", "centre", "mask", "gain")}
        self.ordinary = self.record._replace(**per_row)
        weight = weight_record(tensors["weight_codes"], tensors["weight_scale"], tensors["absorbed_bias"])
        self.matrix = dequantize_weight(weight.codes, weight.scale).to(device)
        self.absorbed_bias = weight.absorbed_bias.to(device)
        self.bias = bias
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], in its dtype."""
        flat = x.reshape(-1, x.shape[-1])
        codes, rows = self.codes(flat)
        y = (codes.float() * self.record.gain[rows][:, None]) @ self.matrix.T + self.absorbed_bias[rows]
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [M, K] and row int32 [M] of each token of x [M, K]."""
        rows = torch.full(x.shape[:1], self.row, dtype=torch.int32, device=x.device)
        # Almost every token: one row for all is several times faster than a gathered row each.
        codes = act_quant(x, rows, self.ordinary)
        rows = token_rows(x, rows, self.record)
        massive = (rows != self.row).nonzero().flatten()
        codes[massive] = act_quant(x[massive], rows[massive], self.record)
        return codes, rows
