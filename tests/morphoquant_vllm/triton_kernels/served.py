"""What the interpreter process does with the backend as vLLM's layers call it: through the custom ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morphoquant_vllm import ops
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from tests.morphoquant_vllm.triton_kernels.cases import Case, layer, tokens


@dataclass(frozen=True)
class Served:
    """One call of both ops beside the reference."""

    codes_equal: bool
    output_error: float  # over what output_bound allows
    shape: tuple[int, ...]
    dtype: torch.dtype


def _pretend(architecture: str, units: int) -> None:
    """Let a CPU pass for a GPU of this architecture, as far as the choice of tiles goes."""
    from morphoquant_vllm.triton_kernels import device, tiles

    profile = device.Profile(tiles.architectures()[architecture], units, inline_assembly=False)
    device.profile_of = lambda _: profile


def run(case: Case, architecture: str, units: int = 4) -> Served:
    """`warm` and both ops of the backend, with the tiles that the table names for an architecture."""
    _pretend(architecture, units)
    weight, record = layer(case)
    x, modality = tokens(case, record)
    longer = torch.cat((modality, torch.full((9,), 1, dtype=torch.int32)))
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    backend = ops.BACKENDS["triton"]
    prepared, prepared_activation = backend.prepare(weight, record)
    backend.warm(prepared, prepared_activation, bias, case.dtype)
    codes = ops.act_quant(x, longer, prepared_activation, "triton")
    y: Tensor = ops.linear(x, longer, prepared, prepared_activation, bias, "triton")
    rows = activation_numerics.token_rows(x, modality, record)
    expected_codes = activation_numerics.act_quant(x, rows, record)
    expected = linear_numerics.matmul(expected_codes, rows, weight, record.gain, bias).to(case.dtype)
    bound = linear_numerics.output_bound(expected_codes, rows, weight, record.gain, expected)
    error = ((y.double() - expected.double()).abs() / bound).flatten().tolist()
    return Served(torch.equal(codes, expected_codes), max(error, default=0.0), tuple(y.shape), y.dtype)


def check_ops(case: Case) -> None:
    """torch's own checks of the two ops with this backend: schema, fake implementation, and compiled like eager."""
    _pretend("sm_80", 4)
    weight, record = layer(case)
    x, modality = tokens(case, record)
    prepared, prepared_activation = ops.BACKENDS["triton"].prepare(weight, record)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.act_quant.default, (x, modality, prepared_activation, "triton"), test_utils=checks)
    arguments = (x, modality, prepared, prepared_activation, None, "triton")
    torch.library.opcheck(ops.linear.default, arguments, test_utils=checks)

    def forward(x: Tensor, modality: Tensor) -> Tensor:
        return ops.linear(x, modality, prepared, prepared_activation, None, "triton") + 1

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (case.tokens, case.tokens - 1):
        assert torch.equal(compiled(x[:count], modality), forward(x[:count], modality))
