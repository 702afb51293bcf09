"""The int8 path of a bound layer: unpack it into the workspace, then multiply int8 x int8; see int8_path.py.

A fused tile unpacks in the product's kernel, and has no workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.gpu import int8_path
from morphoquant_vllm.gpu.launcher import must_be_compiled
from morphoquant_vllm.gpu.product_launch import Product
from morphoquant_vllm.gpu.tiles import Int8Tile
from morphoquant_vllm.gpu.workspace import Workspace


class BoundInt8:
    """y [M, N] in `dtype` of codes and rows; with the layer's `bias`, or without any."""

    def __init__(
        self,
        product: Product,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        tile: Int8Tile,
        workspace: Workspace | None,
    ) -> None:
        """Compiles its kernels, and lets the workspace grow. Raises UnknownFormError, and MorphoQuantError."""
        weight, device = product.weight, product.gain.device
        if workspace is not None:
            workspace.grow(int8_path.workspace_bytes(weight))
        self.tile, self.workspace, self.address = tile, workspace, 0
        self.shape = int8_path.workspace_shape(weight)
        self.in_features, self.out_features = in_features, product.out_features
        memory = None if workspace is None else workspace.memory
        multiply = int8_path.gemm_launch(
            codes=torch.zeros((1, in_features), dtype=torch.int8, device=device),
            rows=torch.zeros(1, dtype=torch.int32, device=device),
            weight=weight,
            weights=int8_path.weight_operand(weight, memory, tile),
            gain=product.gain,
            bias=bias,
            out=torch.empty((1, self.out_features), dtype=dtype, device=device),
            tile=tile,
            pdl=product.pdl,
        )
        self.multiply = must_be_compiled(multiply, "M")
        if memory is not None:
            unpack = int8_path.unpack_launch(
                weight=weight, workspace=memory, inline_assembly=product.inline_assembly, pdl=product.pdl
            )
            self.unpack_programs = unpack.grid[0]
            self.unpack = must_be_compiled(unpack, None)

    def serves(self, stream: int) -> bool:
        """Whether a call on this stream, the current one, may take this path now."""
        return self.workspace is None or self.workspace.serves(stream)

    def __call__(self, stream: int, codes: int, rows: int, y: int, tokens: int) -> None:
        """Fill y, M >= 1; all tensors by their addresses. Call it only if `serves` is true."""
        if self.workspace is not None:
            if self.address != self.workspace.address:
                self._follow(self.workspace.address)
            self.unpack(self.unpack_programs, 1, stream)
        programs = int8_path.programs(self.tile, tokens, self.out_features)
        self.multiply(programs, 1, stream, self._operand(codes, tokens, self.in_features), rows, y, tokens)

    def _follow(self, address: int) -> None:
        """Use the workspace at its new address."""
        self.address = address
        self.unpack.keep("out_ptr", self.address)
        self.multiply.keep("weights", self._operand(self.address, *self.shape))

    def _operand(self, address: int, rows: int, columns: int) -> int | int8_path.AddressDescriptor:
        """The product's argument for an int8 matrix, whose memory it does not keep."""
        return int8_path.AddressDescriptor(address, rows, columns) if self.tile.descriptors else address
