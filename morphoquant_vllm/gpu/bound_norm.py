"""The kernel that norms and quantizes, bound when a layer is loaded; see bound.py."""

from __future__ import annotations

import torch
from torch import Tensor

from morphoquant_vllm.gpu.bound_kernels import ALIGNMENT, MAX_STRIDE, current_stream_of
from morphoquant_vllm.gpu.launcher import CompiledLaunch, UnknownFormError, must_be_compiled
from morphoquant_vllm.gpu.norm_launch import VARYING, NormQuantizer, norm_quantize
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS, aligned


class BoundNorm:
    """Codes int8 [M, K] and rows int32 [M] of the norm of x [M, K], or of x + residual, in `dtype`."""

    def __init__(
        self, quantizer: NormQuantizer, dtype: torch.dtype, kernels: dict[tuple[bool, bool], CompiledLaunch]
    ) -> None:
        """`kernels` by whether there is a residual, and whether there are WHOLE_TOKENS tokens or more."""
        self.dtype, self.in_features, self.kernels = dtype, quantizer.in_features, kernels
        self.programs = quantizer.programs

    def takes(self, x: Tensor, residual: Tensor | None, norm_weight: Tensor) -> bool:
        """Whether the compiled kernels fit the input."""
        tokens = (x,) if residual is None else (x, residual)
        return (
            all(
                part.dtype is self.dtype
                and part.stride(1) == 1
                and part.stride(0) <= MAX_STRIDE
                and part.shape[1] == self.in_features
                for part in tokens
            )
            and norm_weight.dtype is self.dtype
            and norm_weight.data_ptr() % ALIGNMENT == 0
        )

    def __call__(
        self,
        stream: int,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        modality: Tensor,
        codes: int,
        rows: int,
        new_residual: Tensor | None,
    ) -> None:
        """Fill codes and rows, at these addresses, and the new residual; M >= 1, inputs as `takes` wants them."""
        tokens = x.shape[0]
        x = aligned(x)
        second, total = x, x
        if residual is not None and new_residual is not None:
            second, total = aligned(residual), new_residual
        programs, each = self.programs(tokens)
        self.kernels[residual is not None, tokens >= WHOLE_TOKENS](
            *(programs, 1, stream, x.data_ptr(), second.data_ptr(), norm_weight.data_ptr(), modality.data_ptr()),
            *(codes, rows, total.data_ptr(), epsilon, x.stride(0), second.stride(0), tokens, each),
        )


def bind_norm(quantizer: NormQuantizer, dtype: torch.dtype) -> BoundNorm | None:
    """The kernel for few tokens and many, with and without a residual, compiled by running it.

    None for tokens that are too wide. Raises UnknownFormError.
    """
    if not quantizer.fits:
        return None
    device = quantizer.activation.gain.device
    x = torch.zeros((WHOLE_TOKENS, quantizer.in_features), dtype=dtype, device=device)
    total, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    modality = torch.zeros(WHOLE_TOKENS, dtype=torch.int32, device=device)
    rows = torch.empty_like(modality)
    kernels = {}
    for add in (False, True):
        for tokens in (1, WHOLE_TOKENS):
            part = x[:tokens]
            sums = (part, total) if add else (None, None)
            described = quantizer.launch(part, sums[0], x[0], 1e-6, modality, codes, rows, sums[1])
            kernels[add, tokens >= WHOLE_TOKENS] = must_be_compiled(described, VARYING[-1])
    return BoundNorm(quantizer, dtype, kernels)


def norm_quantized(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    epsilon: float,
    modality: Tensor,
    quantizer: NormQuantizer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result of `norm_launch.norm_quantize`, M >= 1, as a bound layer computes it; for the self-check."""
    try:
        bound, stream = bind_norm(quantizer, x.dtype), current_stream_of(x.device)()
    except UnknownFormError:
        bound = None
    if bound is None:
        return norm_quantize(x, residual, norm_weight, epsilon, modality, quantizer)
    codes, rows = torch.empty_like(x, dtype=torch.int8), torch.empty_like(modality)
    new_residual = None if residual is None else torch.empty_like(x)
    addresses = (codes.data_ptr(), rows.data_ptr())
    bound(stream, x, residual, norm_weight, epsilon, modality, *addresses, new_residual)
    return codes, rows, new_residual
