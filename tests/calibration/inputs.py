"""Inputs of one layer as calibration sees them, quantized and served."""

import torch
from torch import Tensor

from calibration.data.token_choice import DrawnTokens, choose_tokens
from calibration.quantize.layer import DrawnInput, QuantizedLayer, quantize_input
from calibration.quantize.observation import Observation
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import activation, linear
from morphoquant_vllm.numerics.statistics import ChannelStatistics
from tests.records import activation_of, weight_of

K = 64
TEXT, AUDIO, ANY, MASSIVE = 0, 3, 4, 5
# Settings under which weights are rounded to the nearest code and nothing makes up for it.
PLAIN = {"regression": False, "rounding": "nearest"}


def make_spec(
    shards: dict[str, Tensor], parallel: str = "column", blocks: int = 1, scheme: str = "group"
) -> QuantizationSpec:
    layers = {
        name: LayerSpec(*weight.shape[::-1], 32, parallel, "m.fused", scale_scheme=scheme)
        for name, weight in shards.items()
    }
    return QuantizationSpec(layers=layers, tensor_parallel=blocks)


def observe(
    x: Tensor, modality: Tensor, balance: float, outlying: Tensor, x16: Tensor
) -> tuple[DrawnInput, DrawnTokens]:
    tokens = choose_tokens([modality], budget=x.shape[0], balance=balance, seed=0)
    rows = torch.where(outlying, MASSIVE, modality)
    statistics = {int(row): ChannelStatistics.of(x[rows == row]) for row in rows.unique()}
    chosen = tokens.positions[0]
    return DrawnInput(Observation(statistics, x[chosen]), x16[chosen], outlying[chosen]), tokens


def activations(tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mostly text; channel 5 is heavy-tailed in text, channel 9 only in the few audio tokens."""
    generator = torch.Generator().manual_seed(seed)
    # Channels share some directions, as those of a model do.
    x = torch.randn(tokens, K, generator=generator) + 0.7 * (
        torch.randn(tokens, 8, generator=generator) @ torch.randn(8, K, generator=torch.Generator().manual_seed(99))
    )
    modality = torch.zeros(tokens, dtype=torch.int32)
    modality[-tokens // 10 :] = AUDIO
    x[::40, 5] *= 60
    x[-tokens // 10 :: 10, 9] *= 60
    return x, modality


def with_massive(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Every 25th token is massive: hundreds on four channels, nearly the same in all of them."""
    x, modality = activations(seed=seed)
    outlying = torch.arange(x.shape[0]) % 25 == 0
    generator = torch.Generator().manual_seed(seed + 7)
    kind = torch.randn(K, generator=torch.Generator().manual_seed(8))
    kind[[3, 20, 35, 60]] = torch.tensor([300.0, -250.0, 150.0, 200.0])
    noise = torch.randn(int(outlying.sum()), K, generator=generator)
    x[outlying] = kind * (1 + 0.01 * noise) + 0.1 * noise
    return x, modality, outlying


def matrix(out_features: int = 32, seed: int = 3) -> Tensor:
    return torch.randn(out_features, K, generator=torch.Generator().manual_seed(seed))


def quantize(
    x: Tensor,
    modality: Tensor,
    shards: dict[str, Tensor],
    balance: float = 1.0,
    outlying: Tensor | None = None,
    x16: Tensor | None = None,
    spec: QuantizationSpec | None = None,
    **settings: object,
) -> dict[str, QuantizedLayer]:
    outlying = torch.zeros(x.shape[0], dtype=torch.bool) if outlying is None else outlying
    sample, tokens = observe(x, modality, balance, outlying, x if x16 is None else x16)
    recipe = Recipe(**settings)
    return quantize_input(sample, tokens, shards, spec or make_spec(shards, scheme=recipe.scale_scheme), recipe)


def serve(x: Tensor, tensors: dict[str, Tensor], modality: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and output as the stored tensors give them, of tokens of known or unknown modality."""
    record = activation_of(tensors)
    modality = torch.full(x.shape[:1], ANY, dtype=torch.int32) if modality is None else modality
    codes = activation.act_quant(x, activation.token_rows(x, modality, record), record)
    return codes, linear.linear(x, modality, weight_of(tensors), record)


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())
