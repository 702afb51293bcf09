"""What the interpreter process does with the backend as vLLM's layers call it: through the custom ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from tests.morphoquant_vllm.gpu.cases import Case, layer, tokens

# Everything that is launched, by the module that describes the launch.
KERNELS = {
    "quantize_activation": "quantize_launch",
    "quantize_in_order": "quantize_launch",
    "quantize_tokens": "quantize_launch",
    "int4_gemm": "product_launch",
    "reduce_splits": "product_launch",
    "unpack_int8": "int8_path",
    "int8_gemm": "int8_path",
    "quantize_normed": "norm_launch",
    "int4_gemm_adding": "adding_launch",
}


@dataclass(frozen=True)
class Served:
    """One call of both ops beside the reference."""

    codes_equal: bool
    output_error: float  # over what output_bound allows
    shape: tuple[int, ...]
    dtype: torch.dtype


def pretend(architecture: str, units: int) -> None:
    """Let a CPU pass for a GPU of this architecture, as far as the choice of tiles goes."""
    from morphoquant_vllm.gpu import device, selfcheck, tiles

    # Tested by itself; interpreted it takes seconds for each layer.
    selfcheck.check = lambda *_: None
    profile = device.Profile(tiles.architectures()[architecture], units, inline_assembly=False, pdl=False)
    device.profile_of = lambda _: profile


def run(case: Case, architecture: str, units: int = 4) -> Served:
    """A bound layer and the quantizer's op, with the tiles that the table names for an architecture."""
    pretend(architecture, units)
    weight, record = layer(case)
    x, modality = tokens(case, record)
    longer = torch.cat((modality, torch.full((9,), 1, dtype=torch.int32)))
    bias = torch.linspace(-1, 1, case.out_features).to(case.dtype) if case.bias else None
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    handle = ops.bind(prepared, prepared_activation, bias, case.dtype, "triton")
    codes = ops.act_quant(x, longer, prepared_activation, "triton")
    y: Tensor = ops.bound_linear(x, longer, handle, bias)
    assert torch.equal(y, ops.linear(x, longer, prepared, prepared_activation, bias, "triton"))
    rows = activation_numerics.token_rows(x, modality, record)
    expected_codes = activation_numerics.act_quant(x, rows, record)
    expected = linear_numerics.matmul(expected_codes, rows, weight, record.gain, bias).to(case.dtype)
    bound = linear_numerics.output_bound(expected_codes, rows, weight, record.gain, expected)
    error = ((y.double() - expected.double()).abs() / bound).flatten().tolist()
    return Served(torch.equal(codes, expected_codes), max(error, default=0.0), tuple(y.shape), y.dtype)


def check_ops(case: Case) -> None:
    """torch's own checks of the two ops with this backend: schema, fake implementation, and compiled like eager."""
    pretend("sm_80", 4)
    weight, record = layer(case)
    x, modality = tokens(case, record)
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.act_quant.default, (x, modality, prepared_activation, "triton"), test_utils=checks)
    arguments = (x, modality, prepared, prepared_activation, None, "triton")
    torch.library.opcheck(ops.linear.default, arguments, test_utils=checks)

    def forward(x: Tensor, modality: Tensor) -> Tensor:
        return ops.linear(x, modality, prepared, prepared_activation, None, "triton") + 1

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (case.tokens, case.tokens - 1):
        assert torch.equal(compiled(x[:count], modality), forward(x[:count], modality))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches = 0
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def launches(case: Case, architecture: str, units: int, silu_mul: bool) -> dict[str, int]:
    """How often one call of an op launches each kernel; `silu_mul`: the op that computes silu(gate) * up as well."""
    from importlib import import_module

    pretend(architecture, units)
    weight, record = layer(case)
    x, modality = tokens(case, record)
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    rooms = {name: import_module(f"morphoquant_vllm.gpu.{module}") for name, module in KERNELS.items()}
    kernels = {name: Counted(getattr(room, name)) for name, room in rooms.items()}
    try:
        for name, kernel in kernels.items():
            setattr(rooms[name], name, kernel)
        if silu_mul:
            ops.silu_mul_linear(torch.cat((x, x), 1), modality, prepared, prepared_activation, None, "triton")
        else:
            ops.linear(x, modality, prepared, prepared_activation, None, "triton")
    finally:
        for name, kernel in kernels.items():
            setattr(rooms[name], name, kernel.kernel)
    return {name: kernel.launches for name, kernel in kernels.items()}


def fused(case: Case, architecture: str) -> bool:
    """Whether the fused op gives the bits of the plain one on what torch makes of gate and up."""
    pretend(architecture, 4)
    weight, record = layer(case)
    up, modality = tokens(case, record)
    gate = torch.randn(up.shape, generator=torch.Generator().manual_seed(3)).to(case.dtype)
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    y = ops.silu_mul_linear(torch.cat((gate, up), 1), modality, prepared, prepared_activation, None, "triton")
    x = torch.nn.functional.silu(gate) * up
    return torch.equal(y, ops.linear(x, modality, prepared, prepared_activation, None, "triton"))


def self_check(two_level: bool) -> tuple[list[str], str]:
    """What `selfcheck` says of sound kernels, tiles of a table and all quantizers, and of one that is not."""
    from morphoquant_vllm.gpu import bound_calls, device, quantize_launch, selfcheck, tiles

    profile = device.Profile(tiles.architectures()["sm_80"], 4, inline_assembly=False, pdl=False)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    found = [
        selfcheck.problem_of_quantizer(288, in_order, tokens, silu_mul, dtype, cpu, profile)
        for in_order in (False, True)
        for tokens in (3, quantize_launch.WHOLE_TOKENS)
        for silu_mul in (False, True)
    ]
    tile = profile.architecture.tile(16, 32, two_level)
    found += [selfcheck.problem_of_tile(tile, 32, splits, dtype, cpu, profile) for splits in (1, 2)]
    sound = bound_calls.multiplied

    def wrong(codes: Tensor, *arguments: Any) -> Tensor:
        y = sound(codes, *arguments)
        y[-1, -1] += 1 + y[-1, -1].abs() / 16
        return y

    bound_calls.multiplied = wrong
    try:
        return found, selfcheck.problem_of_tile(tile, 32, 1, torch.float16, cpu, profile)
    finally:
        bound_calls.multiplied = sound


def self_check_of_the_quantizer() -> str:
    """What `selfcheck` says of a quantizer of which one code is wrong."""
    from morphoquant_vllm.gpu import bound_calls, device, selfcheck, tiles

    profile = device.Profile(tiles.architectures()["sm_80"], 4, inline_assembly=False, pdl=False)
    sound = bound_calls.quantized

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        codes, rows = sound(*arguments)
        codes[1, 1] ^= 1
        return codes, rows

    bound_calls.quantized = wrong
    try:
        return selfcheck.problem_of_quantizer(96, False, 3, False, torch.float16, torch.device("cpu"), profile)
    finally:
        bound_calls.quantized = sound
