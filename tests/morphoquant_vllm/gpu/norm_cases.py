"""What the interpreter process does with the kernel that norms and quantizes: run it beside the torch reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.gpu import layout
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import norm
from morphoquant_vllm.numerics.activation import ActivationRecord
from tests.morphoquant_vllm.gpu.cases import ROWS, Case, layer
from tests.morphoquant_vllm.gpu.served import pretend

EPSILON = 1e-6


@dataclass(frozen=True)
class NormAgreement:
    """The kernel's norm beside the reference's, and its codes beside the quantizer's on the kernel's own norm."""

    values: int
    other_values: int  # values of the norm that the kernel rounded the other way
    farthest: float  # of these, over two units in the last place
    residual_equal: bool
    codes_equal: bool  # all of them, given the kernel's norm
    rows_equal: bool  # likewise
    same_without_normed: bool  # codes and rows of the kernel that does not write its norm
    codes_of_equal_tokens: bool  # codes of tokens whose whole norm is the reference's
    massive: int
    escapes: int


def inputs(case: Case, record: ActivationRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and residual [M, K], weight [K], modality; tokens 0, 3, ... are massive, tokens 1, 4, ... are not.

    Of more than 8 tokens the last three hold a NaN, an infinity and nothing but zeros.
    """
    generator = torch.Generator().manual_seed(case.tokens + case.in_features)
    x = torch.randn(case.tokens, case.in_features, generator=generator) * 3
    x[torch.rand(x.shape, generator=generator) < 0.01] *= 30
    residual = torch.randn(x.shape, generator=generator)
    weight = 1 + torch.rand(case.in_features, generator=generator)
    x[0::3, record.massive_channel[-1].long()] = 3.0
    x[1::3, record.massive_channel.flatten().long()] = -60.0
    if case.tokens > 8:
        x[-1, 5], x[-2, 5], x[-3], residual[-3] = float("nan"), float("inf"), 0.0, 0.0
    modality = torch.randint(ROWS - 1, (case.tokens,), generator=generator, dtype=torch.int32)
    return x.to(case.dtype), residual.to(case.dtype), weight.to(case.dtype), modality


def compare(case: Case, add: bool) -> NormAgreement:
    """Run the kernel on the input of a random layer, with a residual or without."""
    from morphoquant_vllm.gpu import norm_launch

    _, record = layer(case)
    x, residual, weight, modality = inputs(case, record)
    if add:
        expected, new_residual = norm.add_rms_norm(x, residual, weight, EPSILON)
    else:
        expected, new_residual = norm.rms_norm(x, weight, EPSILON), None
    normed = torch.empty_like(x)
    prepared = layout.prepare_activation(record)
    arguments = (x, residual if add else None, weight, EPSILON, modality)
    one, two = (norm_launch.NormQuantizer(prepared, False, units) for units in (1, 2))
    codes, rows, found_residual = norm_launch.norm_quantize(*arguments, one, normed)
    served = norm_launch.norm_quantize(*arguments, two)
    own_rows = activation_numerics.token_rows(normed, modality, record)
    other = ~((normed == expected) | (normed.isnan() & expected.isnan()))
    off = (normed.float() - expected.float()).abs() / (2 * torch.finfo(case.dtype).eps * expected.float().abs())
    same = ~other.any(1)
    expected_rows = activation_numerics.token_rows(expected, modality, record)
    expected_codes = activation_numerics.act_quant(expected, expected_rows, record)
    return NormAgreement(
        values=other.numel(),
        other_values=int(other.sum()),
        farthest=float(off[other].max()) if bool(other.any()) else 0.0,
        residual_equal=not add or torch.equal(found_residual.nan_to_num(7.0), new_residual.nan_to_num(7.0)),
        codes_equal=torch.equal(codes, activation_numerics.act_quant(normed, own_rows, record)),
        rows_equal=torch.equal(rows, own_rows),
        same_without_normed=torch.equal(served[0], codes) and torch.equal(served[1], rows),
        codes_of_equal_tokens=torch.equal(codes[same], expected_codes[same]),
        massive=int((rows == ROWS - 1).sum()),
        escapes=int(activation_numerics.escapes(codes).sum()),
    )


class AlignedTokens:
    """The kernel, launched only on tokens that begin on 16 bytes, multiples of 16 apart."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> Any:
            for tokens in (arguments["x_ptr"], arguments["residual_ptr"]):
                assert tokens.data_ptr() % 16 == 0 and tokens.stride(0) % 16 == 0 and tokens.stride(1) == 1
            return self.kernel[grid](**arguments)

        return run


def strided_input_agrees(case: Case, first: int) -> bool:
    """Codes of slices from channel `first` on of tokens twice as wide: rows do not follow each other."""
    from morphoquant_vllm.gpu import norm_launch

    _, record = layer(case)
    x, residual, weight, modality = inputs(case, record)
    quantizer = norm_launch.NormQuantizer(layout.prepare_activation(record), False, 1)
    wide = [torch.cat((tensor, tensor), 1)[:, first : first + case.in_features] for tensor in (x, residual)]
    kernel = norm_launch.quantize_normed
    norm_launch.quantize_normed = AlignedTokens(kernel)
    try:
        found = norm_launch.norm_quantize(*wide, weight, EPSILON, modality, quantizer)
    finally:
        norm_launch.quantize_normed = kernel
    expected = norm_launch.norm_quantize(*(part.contiguous() for part in wide), weight, EPSILON, modality, quantizer)
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def fused(case: Case, architecture: str, add: bool, widest: int | None = None) -> tuple[bool, bool]:
    """Whether the fused op gives the plain one's bits on the kernel's norm, and the reference's residual.

    `widest`: channels from which on torch norms.
    """
    from morphoquant_vllm.gpu import norm_launch

    pretend(architecture, 4)
    weight, record = layer(case)
    x, residual, norm_weight, modality = inputs(case, record)
    longer = torch.cat((modality, torch.full((9,), 1, dtype=torch.int32)))
    prepared = backends.BACKENDS["triton"].prepare(weight, record)
    handle = ops.bind(*prepared, None, case.dtype, "triton")
    normed = torch.empty_like(x)
    quantizer = norm_launch.NormQuantizer(layout.GpuActivation(*prepared[1]), False, 4)
    norm_launch.norm_quantize(x, residual if add else None, norm_weight, EPSILON, modality, quantizer, normed)
    before = norm_launch.WIDEST_NORM
    norm_launch.WIDEST_NORM = before if widest is None else widest
    try:
        arguments = (norm_weight, EPSILON, longer, handle, None)
        if add:
            y, new_residual = ops.add_rms_norm_linear(x, residual, *arguments)
        else:
            y, new_residual = ops.rms_norm_linear(x, *arguments), None
    finally:
        norm_launch.WIDEST_NORM = before
    expected = norm.add_rms_norm(x, residual, norm_weight, EPSILON)[1] if add else None
    return (
        torch.equal(y, ops.bound_linear(normed, longer, handle, None)),
        not add or torch.equal(new_residual, expected),
    )


def self_check() -> tuple[list[str], list[str]]:
    """What `selfcheck` says of the sound kernel, and of three that are wrong: a code, a row, a residual."""
    from morphoquant_vllm.gpu import bound_norm, device, norm_launch, selfcheck, tiles
    from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS

    profile = device.Profile(tiles.architectures()["sm_80"], 1, inline_assembly=False, pdl=False)
    settings = (torch.bfloat16, torch.device("cpu"), profile)
    sound = [
        selfcheck.problem_of_norm_quantizer(96, in_order, tokens, add, *settings)
        for in_order, tokens, add in ((False, 3, False), (True, 3, True), (False, WHOLE_TOKENS, True))
    ]
    kernel = norm_launch.norm_quantize
    wrong = []
    for index in range(3):

        def spoiled(*arguments: Any, index: int = index, **settings: Any) -> tuple[Tensor, ...]:
            found = kernel(*arguments, **settings)
            found[index].flatten()[1] += 1
            return found

        norm_launch.norm_quantize = bound_norm.norm_quantize = spoiled
        try:
            wrong.append(selfcheck.problem_of_norm_quantizer(96 + index, False, 3, True, *settings))
        finally:
            norm_launch.norm_quantize = bound_norm.norm_quantize = kernel
    return sound, wrong
