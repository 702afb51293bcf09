"""The sizes of published decoders, and the linears of one of their layers, separate and fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def qwen2(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """Keys of a Qwen2 config that size it."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# Published models, and one for tests, which has the tokenizer's vocabulary.
MODELS = {
    "tiny": qwen2(128, 256, 2, 4, 2, 512, tied=False),
    "Qwen2.5-0.5B": qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
}


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer: its name below the layer, N and K, and the fused layer that it is a shard of."""

    name: str
    outputs: int
    channels: int
    fused: str = ""
    bias: bool = False


def fused(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """N and K of the linears of one decoder layer as vLLM fuses them; `sizes` are a config's."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    heads = head * sizes["num_attention_heads"]
    return {
        "qkv": (heads + 2 * head * sizes["num_key_value_heads"], hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def linears(model: str) -> list[Linear]:
    """The seven linears of one decoder layer."""
    config = MODELS[model]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return [
        Linear("self_attn.q_proj", hidden, hidden, "self_attn.qkv_proj", bias=True),
        Linear("self_attn.k_proj", kv, hidden, "self_attn.qkv_proj", bias=True),
        Linear("self_attn.v_proj", kv, hidden, "self_attn.qkv_proj", bias=True),
        Linear("self_attn.o_proj", hidden, hidden),
        Linear("mlp.gate_proj", inner, hidden, "mlp.gate_up_proj"),
        Linear("mlp.up_proj", inner, hidden, "mlp.gate_up_proj"),
        Linear("mlp.down_proj", hidden, inner),
    ]


def sixteen_bit_bytes(model: str) -> int:
    """Size of the model's weights in bfloat16."""
    config = MODELS[model]
    decoder = config["num_hidden_layers"] * sum(linear.outputs * linear.channels for linear in linears(model))
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    return 2 * (decoder + embeddings)


# Layers that GPU benchmarks time, N and K: a 7B model's, and the one projection that the roofline is quoted for.
GPU_LAYERS = fused(MODELS["Qwen2.5-7B"]) | {"up": (18944, 3584)}
# Numbers of tokens at which they do.
GPU_TOKENS = (1, 16, 64, 256, 2048)
