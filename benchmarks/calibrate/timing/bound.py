"""The least time that calibrating a decoder block can take: its floating-point operations over measured rates. Pure.

    M   tokens of all samples            T   tokens drawn for the second moments
    K   in_features of a distinct input  N   out_features of all linears that read it

    two forwards      2 x (2 M N K of every input, and the attention of the causal half)
    one Hessian       2 T K^2 of every input, as a plain matrix product: bf16 products use no symmetry
    factorisation     4/3 K^3 of every input: Cholesky (1/3), inverse from it (2/3), Cholesky of the inverse (1/3)
    GPTQ updates      N K^2 of every input: column j changes the K - j columns after it

Of experts, M and T count a token once for each expert that it chose; every expert has Hessians, factors and updates of
its own.

Forwards and Hessians run at the rate of bf16 products, the rest at that of fp32 products. The bound leaves out these
steps of a real calibration: reading weights, norms and activation functions, quantizing activations and the search for
steps. It also leaves out regression and its products, fitting scales and codes to each other, and float64 in the served
layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.models.shapes import fused


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, as its config names them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    # Channels of a head; 0: its share of the hidden size.
    head_dim: int = 0
    # Experts of a block, those that a token chooses, and the intermediate size of one; 0: a dense MLP.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0

    @staticmethod
    def of(text_config: Mapping[str, Any]) -> Decoder:
        """The sizes in a text config."""
        known = Decoder.__dataclass_fields__
        return Decoder(**{name: int(text_config[name]) for name in known if name in text_config})

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def inputs(self) -> dict[str, tuple[int, int]]:
        """N, K of every distinct input of a block; N counts all linears that read it, of one expert if it has any."""
        return fused(
            {
                "hidden_size": self.hidden_size,
                "intermediate_size": self.moe_intermediate_size or self.intermediate_size,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head,
            }
        )

    def copies(self, name: str) -> tuple[int, int]:
        """How many of this input's linears a block has, and how many of them see a token."""
        routed = self.num_experts and name in ("gate_up", "down")
        return (self.num_experts, self.num_experts_per_tok) if routed else (1, 1)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one block."""

    forwards: float
    hessians: float
    factorisation: float
    updates: float


def block_work(decoder: Decoder, samples: int, tokens: int, drawn: int) -> Work:
    """The work for one block, with `samples` sequences of `tokens` tokens each, `drawn` of all of them for moments."""
    shapes = [(n, k, *decoder.copies(name)) for name, (n, k) in decoder.inputs().items()]
    linears = sum(2 * samples * tokens * chosen * n * k for n, k, _, chosen in shapes)
    # Scores and their product with the values: half (causal) of 2 L^2 each per channel.
    attention = samples * 2 * tokens**2 * decoder.num_attention_heads * decoder.head
    return Work(
        forwards=2 * (linears + attention),
        hessians=sum(2 * drawn * chosen * k**2 for _, k, _, chosen in shapes),
        factorisation=sum(count * 4 * k**3 / 3 for _, k, count, _ in shapes),
        updates=sum(count * n * k**2 for n, k, count, _ in shapes),
    )


def seconds(work: Work, products: float, fp32: float) -> float:
    """Least seconds of the work at `products` FLOP/s for forwards and Hessians, and `fp32` FLOP/s for the rest."""
    return (work.forwards + work.hessians) / products + (work.factorisation + work.updates) / fp32


def cached_inputs(decoder: Decoder, samples: int, tokens: int, itemsize: int) -> int:
    """Bytes of the hidden states between blocks: of the 16-bit model, and of the layers quantized so far."""
    return 2 * samples * tokens * decoder.hidden_size * itemsize
