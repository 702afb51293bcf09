"""A quantized linear that replaces the model's linear: later layers are then calibrated on served outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import INPUT_TENSORS, OUTPUT_TENSORS, scale_scheme_of
from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, activation_record, token_rows
from morphoquant_vllm.numerics.linear import WeightRecord, weight_record


@dataclass
class TokenRows:
    """The modality rows of the running sample's tokens, for the linears of a block; a server has the same rows."""

    any_row: int
    # Row of each token, int [M]; None if unknown.
    modality: Tensor | None = None

    def modality_of(self, x: Tensor) -> Tensor:
        """The row of each token of x [M, K] that is not massive, int32 [M]."""
        if self.modality is None:
            return torch.full(x.shape[:1], self.any_row, dtype=torch.int32, device=x.device)
        return self.modality.to(x.device, torch.int32)


def _prepared(weight: WeightRecord, activation: ActivationRecord, dtype: torch.dtype) -> backends.Prepared | None:
    """The records for the kernels of their device; None if none serve them, as on a GPU in float32."""
    backend = backends.select_backend(weight.codes.device)
    if backend == "reference":
        return None
    try:
        return backends.prepare_layer("calibration", weight, activation, dtype, backend)
    except MorphoQuantError:
        return None


class ServedLinear(nn.Module):
    """The integer layer of a checkpoint's tensors: the sums of numerics.linear in float32, for speed.

    The serving kernels compute it, if they serve this device and activations of `dtype`. Their group sums are exact
    integers, and they are several times as fast as a product with dequantized weights. `serving` gives the row of each
    token that is not massive.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        serving: TokenRows,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.record = activation_record(*(tensors[name].to(device) for name in INPUT_TENSORS))
        weight = weight_record(*(tensors[name].to(device) for name in OUTPUT_TENSORS[scale_scheme_of(tensors)]))
        # The kernels' records, or else the dequantized weights.
        self.prepared = _prepared(weight, self.record, dtype)
        self.matrix = None if self.prepared is not None else weight.dequantized()
        self.absorbed_bias = weight.absorbed_bias.to(device)
        self.bias = bias
        self.serving = serving

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], in its dtype."""
        flat = x.reshape(-1, x.shape[-1])
        if self.prepared is not None:
            return self.prepared.linear(flat, self.serving.modality_of(flat), self.bias).view(*x.shape[:-1], -1)
        assert self.matrix is not None
        codes, rows = self.codes(flat)
        y = (codes.float() * self.record.gain[rows][:, None]) @ self.matrix.T + self.absorbed_bias[rows]
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [M, K] and row int32 [M] of each token of x [M, K]."""
        rows = token_rows(x, self.serving.modality_of(x), self.record)
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        # Processing all tokens of one row at a time is several times faster than gathering a row per token.
        for row in rows.unique().tolist():
            per_row = {name: getattr(self.record, name)[row][None] for name in ("inverse", "centre", "mask", "gain")}
            in_row = rows == row
            codes[in_row] = act_quant(x[in_row], rows[in_row], self.record._replace(**per_row))
        return codes, rows
