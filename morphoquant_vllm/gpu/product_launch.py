"""The launches of the matrix product: codes x packed weights, and the addition of the partial sums of a split K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.gpu.kernels.gemm import int4_gemm
from morphoquant_vllm.gpu.kernels.reduce_splits import reduce_splits
from morphoquant_vllm.gpu.launcher import Launch
from morphoquant_vllm.gpu.layout import TILE_N, GpuWeight, group_size_of
from morphoquant_vllm.gpu.tiles import Tile

REDUCE_BLOCK_N = 256
REDUCE_WARPS = 4
# Tiles of tokens that use one tile of weights before the next: the codes of 8 * 128 tokens fit into L2 with it.
GROUP_M = 8


@dataclass(frozen=True)
class Product:
    """The settings that all launches of a layer's product share."""

    weight: GpuWeight
    gain: Tensor  # float32 [R], divided by 16
    # Whether unpacking may use NVIDIA instructions.
    inline_assembly: bool
    # Whether each kernel starts while the one before ends; see kernels/pdl.py.
    pdl: bool

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.absorbed_bias.shape[1]

    @property
    def sums(self) -> torch.dtype:
        """Dtype of the partial sums of a split K."""
        return torch.int32 if self.weight.two_level else torch.float32

    def multiply(
        self, codes: Tensor, rows: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, splits: int
    ) -> Launch:
        """The launch that multiplies codes int8 [M, K] into y [M, N], or into partial sums [splits, M, N]; M >= 1."""
        tokens, in_features = codes.shape
        channels = 2 * self.weight.codes.shape[3]
        arguments = self._terms(rows, bias) | {
            "codes_ptr": codes,
            "weight_ptr": self.weight.codes.view(torch.int8),
            "scale_ptr": self.weight.scale,
            "out_ptr": out,
            "M": tokens,
            "N": self.out_features,
            "K": in_features,
            "splits": splits,
            "G": group_size_of(self.weight),
            "P": channels,
            "TILE_N": TILE_N,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "PARTIAL": splits > 1,
            "GROUP_M": GROUP_M,
            "EVEN_K": in_features % (channels * (1 + self.weight.two_level)) == 0,
            "ASM": self.inline_assembly,
            "STAGES": tile.stages,
            "UNROLL": tile.unroll,
            "JOINED": tile.joined,
        }
        grid = (programs(tile, tokens, self.out_features), splits)
        return Launch(int4_gemm, grid, arguments, {"num_warps": tile.warps} | self._options())

    def reduce(self, parts: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
        """The launch that adds the partial sums [splits, M, N] to y [M, N]."""
        splits, tokens, _ = parts.shape
        arguments = self._terms(rows, bias) | {
            "part_ptr": parts,
            "out_ptr": y,
            "M": tokens,
            "N": self.out_features,
            "splits": splits,
            "BLOCK_N": REDUCE_BLOCK_N,
        }
        grid = (tokens, -(-self.out_features // REDUCE_BLOCK_N))
        return Launch(reduce_splits, grid, arguments, {"num_warps": REDUCE_WARPS} | self._options())

    def _terms(self, rows: Tensor, bias: Tensor | None) -> dict[str, Any]:
        """Arguments for the epilogue of either kernel."""
        # The kernel does not read it, but it must be a pointer.
        unread = self.gain
        return {
            "channel_scale_ptr": self.weight.channel_scale if self.weight.two_level else unread,
            "rows_ptr": rows,
            "gain_ptr": self.gain,
            "absorbed_bias_ptr": self.weight.absorbed_bias,
            "bias_ptr": unread if bias is None else bias,
            "HAS_BIAS": bias is not None,
            "TWO_LEVEL": self.weight.two_level,
            "PDL": self.pdl,
        }

    def _options(self) -> dict[str, Any]:
        return {"enable_fp_fusion": True} | ({"launch_pdl": True} if self.pdl else {})


def programs(tile: Tile, tokens: int, out_features: int) -> int:
    """Tiles of the output."""
    return -(-tokens // tile.block_m) * -(-out_features // tile.block_n)
