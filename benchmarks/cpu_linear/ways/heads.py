"""Each way of running lm_head on a CPU, as a function of x [M, K]: vLLM's, and ours in 16 and in 8 bit."""

from __future__ import annotations

import torch

from benchmarks.cpu_linear.ways.peers import Linear, onednn_bf16
from benchmarks.models.shapes import MODELS
from morphoquant_vllm import ops
from morphoquant_vllm.cpu import head as cpu_head
from morphoquant_vllm.host_memory import zero_bytes
from morphoquant_vllm.numerics.head import quantize_outputs

# N x K of the heads of Qwen2.5-1.5B (its embedding) and of Qwen2.5-Omni-7B.
HEADS: dict[str, tuple[int, int]] = {
    f"{size} lm_head": (MODELS[f"Qwen2.5-{size}"]["vocab_size"], MODELS[f"Qwen2.5-{size}"]["hidden_size"])
    for size in ("1.5B", "7B")
}
TOKENS = (1, 2, 4, 8, 16, 64)


def head_bytes(outputs: int, channels: int) -> dict[str, float]:
    """Bytes of a head's weights and scales, by way."""
    sixteen = 2.0 * outputs * channels
    return {"oneDNN bf16": sixteen, "MorphoQuant bf16": sixteen, "MorphoQuant int8": sixteen / 2 + 4 * outputs}


def heads(outputs: int, channels: int) -> tuple[dict[str, Linear], list[str]]:
    """Every way that runs on this machine, by name, and the reasons why others are left out."""
    weight = torch.randn(outputs, channels, dtype=torch.bfloat16)
    made: dict[str, Linear] = {"oneDNN bf16": onednn_bf16(outputs, channels)}
    left_out = []
    # In large pages, as the plugin has both.
    codes, scale = quantize_outputs(weight, zero_bytes(weight.numel()).view(torch.int8).view(outputs, channels))
    placed = zero_bytes(2 * weight.numel()).view(torch.bfloat16).view(outputs, channels).copy_(weight)
    if cpu_head.serves_bfloat16(placed):
        made["MorphoQuant bf16"] = lambda x: ops.head_bfloat16(x, placed)
    else:
        left_out.append("MorphoQuant bf16: needs AVX512-BF16, and no AMX")
    made["MorphoQuant int8"] = lambda x: ops.head(x, codes, scale)
    return made, left_out
