"""Each way of running one linear on a CPU, as a function of x [M, K]: ours, and vLLM's with its own operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cpu_linear.layers import generated
from benchmarks.cpu_linear.ways import zen
from morphoquant_vllm import ops
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.errors import MorphoQuantError

Linear = Callable[[Tensor], Tensor]


def ours(outputs: int, channels: int, group_size: int, tokens: int, two_level: bool) -> Linear:
    """The op as vLLM calls it, activation quantization included; tokens of all rows but the massive one."""
    if not cpu.available():
        raise MorphoQuantError("the CPU kernels do not run here; the warning above says why")
    weight, activation = cpu.prepare(*generated(outputs, channels, group_size, 1, two_level))
    modality = torch.arange(tokens, dtype=torch.int32) % 5
    return lambda x: ops.linear(x, modality, weight, activation, None, "cpu")


def onednn_bf16(outputs: int, channels: int) -> Linear:
    """vLLM's default linear on a CPU."""
    from vllm import _custom_ops

    handler = _custom_ops.create_onednn_mm(torch.randn(outputs, channels, dtype=torch.bfloat16).t(), 32)
    return lambda x: _custom_ops.onednn_mm(handler, x, None)


def torch_bf16(outputs: int, channels: int) -> Linear:
    """torch's linear, which vLLM uses if oneDNN has none for the processor."""
    weight = torch.randn(outputs, channels, dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def onednn_w8a8(outputs: int, channels: int) -> Linear:
    """vLLM's int8 linear: scale per output, symmetric dynamic scale per token."""
    from vllm import _custom_ops

    weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8).t()
    scale = torch.full((outputs, 1), 0.01)
    handler = _custom_ops.create_onednn_scaled_mm(weight, scale, torch.bfloat16, True, False, 32)

    def run(x: Tensor) -> Tensor:
        codes, scales, zero_points = _custom_ops.onednn_scaled_int8_quant(x, None, None, True)
        # The handler holds the scales' address only: without this use they would be freed and read.
        y = torch.empty((x.shape[0], scale.shape[0]), dtype=x.dtype)
        return _custom_ops.onednn_scaled_mm(handler, codes, y, scales, zero_points, None, None)

    return run


def w4a16(outputs: int, channels: int, group_size: int) -> Linear:
    """vLLM's int4 linear with 16-bit activations, as GPTQ checkpoints are served on a CPU."""
    from vllm import _custom_ops

    # 16 outputs to a block, 8 codes to an int32.
    weight = torch.randint(-(2**31), 2**31 - 1, (outputs // 16, channels * 2), dtype=torch.int32)
    scale = torch.full((channels // group_size, outputs), 0.01, dtype=torch.bfloat16)
    return lambda x: _custom_ops.cpu_gemm_wna16(x, weight, scale, None, None, 8, "vec")


def linears(outputs: int, channels: int, group_sizes: list[int], tokens: int) -> tuple[dict[str, Linear], list[str]]:
    """Every way that runs on this machine, by name, and the reasons why others are left out."""
    x = torch.randn(tokens, channels).bfloat16()
    made: dict[str, Linear] = {}
    left_out = []
    peers: dict[str, Callable[[], Linear]] = {
        "oneDNN bf16": lambda: onednn_bf16(outputs, channels),
        "torch bf16": lambda: torch_bf16(outputs, channels),
        "oneDNN W8A8": lambda: onednn_w8a8(outputs, channels),
        "W4A16 cpu_gemm_wna16": lambda: w4a16(outputs, channels, 128),
        "zentorch W8A8": lambda: zen.w8a8(outputs, channels),
        "zentorch W4A8": lambda: zen.w4a8(outputs, channels, 128),
        "zentorch W4A16": lambda: zen.w4a16(outputs, channels, 128),
    }
    for name, make in peers.items():
        try:
            linear = make()
            linear(x)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            left_out.append(f"{name}: {' '.join(str(error).split())[:200]}")
            continue
        made[name] = linear
    for group_size in group_sizes:
        if channels % group_size == 0:
            for two_level, name in ((False, ""), (True, " two-level")):
                made[f"MorphoQuant G={group_size}{name}"] = ours(outputs, channels, group_size, tokens, two_level)
    return made, left_out
