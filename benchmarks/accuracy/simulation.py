"""A simulated method applied to a transformers model in place: rounded weights, and hooks that round activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.baselines import activations, oracle
from benchmarks.accuracy.baselines.gptq import gptq_int4, hessian_of
from benchmarks.accuracy.baselines.hadamard import rotation
from benchmarks.accuracy.baselines.oracle import Oracle
from benchmarks.accuracy.baselines.weights import nf4, ours_int4, rtn_int4
from benchmarks.accuracy.methods import SEQUENTIAL, Simulated
from benchmarks.models import decoder

Activation = Callable[[Tensor], Tensor]
# Linears whose input comes from a norm, into which SmoothQuant folds its divisors at no cost.
AFTER_NORM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
# In these linears the reference lets every channel bypass the grid.
FULL_MASK = "down_proj"


def apply(
    model: Any,
    blocks: Sequence[nn.Module],
    method: Simulated,
    samples: Sequence[dict[str, Tensor]] = (),
    seed: int = 0,
    on_block: Callable[[int], None] = lambda index: None,
) -> dict[str, Oracle]:
    """Apply `method` to the decoder's linears; return the quantizers that count, by linear name.

    Statistics come from the 16-bit model; with SEQUENTIAL weights each block sees the quantized ones' outputs.
    """
    if method == Simulated():
        return {}
    entries = decoder.capture(model, blocks, samples) if method.calibrated else []
    counting = {}
    for index, block in enumerate(blocks):
        linears = decoder.linears_of(block)
        outputs: list[Tensor] = []
        if method.calibrated:
            groups, outputs = decoder.observe(block, index, entries)
        else:
            groups = [decoder.Group((name,), []) for name in linears]
        for group in groups:
            weights = {name: linears[name].weight.data for name in group.names}
            rounded, activation = fit(method, group.inputs, weights, seed)
            if isinstance(activation, Oracle):
                counting[f"{index}.{group.names[0]}"] = activation
            for name, weight in rounded.items():
                linears[name].weight.data = weight
                if activation is not None:
                    linears[name].register_forward_pre_hook(partial(_replace_input, activation))
                if isinstance(activation, Oracle):
                    # Linears that share an input compute the same codes, which count once.
                    activation = activation.quantize
        del groups
        if method.weights in SEQUENTIAL:
            outputs = decoder.run(block, index, entries)
        for entry, hidden in zip(entries, outputs, strict=True):
            entry.hidden = hidden
        on_block(index)
    for quantizer in counting.values():
        # The calibration counted, too.
        quantizer.bypassed = quantizer.total = 0
    return counting


@torch.no_grad()
def fit(
    method: Simulated, inputs: Sequence[Tensor], weights: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], Activation | None]:
    """Rounded weights [N, K] of the linears that share `inputs` ([M, K] each), and the function of their input.

    Weights without inputs are rounded plainly.
    """
    forward, matrices = _transform(method, inputs, weights, seed)
    seen = list(inputs) if forward is None else [forward(x) for x in inputs]
    hessian = hessian_of(seen) if method.weights in SEQUENTIAL and seen else None
    tokens = sum(x.shape[0] for x in seen)
    rounded = {name: _round(method, matrix, hessian, tokens) for name, matrix in matrices.items()}
    full_mask = any(name.endswith(FULL_MASK) for name in weights)
    quantizer = _activation(method, seen, full_mask)
    if forward is None:
        return rounded, quantizer
    if quantizer is None:
        return rounded, forward
    inner, outer = forward, quantizer
    return rounded, lambda x: outer(inner(x))


def _transform(
    method: Simulated, inputs: Sequence[Tensor], weights: Mapping[str, Tensor], seed: int
) -> tuple[Activation | None, dict[str, Tensor]]:
    """The function that transforms x, and the weights transformed to match, so the product stays the same."""
    first = next(iter(weights.values()))
    if method.transform == "hadamard":
        matrix = rotation(first.shape[1], seed)
        return lambda x: x @ matrix, {name: weight @ matrix for name, weight in weights.items()}
    after_norm = all(name.endswith(AFTER_NORM) for name in weights)
    if method.transform == "smooth-all" or (method.transform == "smooth" and after_norm):
        divisor = activations.smoothing(activations.channel_peak(inputs), weights, method.smooth_alpha)
        return lambda x: x / divisor, {name: weight * divisor for name, weight in weights.items()}
    return None, dict(weights)


def _round(method: Simulated, weight: Tensor, hessian: Tensor | None, tokens: int) -> Tensor:
    if hessian is not None and method.weights == "ours":
        return ours_int4(weight, hessian, tokens, method.group_size, method.levels)
    if hessian is not None:
        return gptq_int4(weight, hessian, method.group_size)
    if method.weights in ("rtn", *SEQUENTIAL):
        return rtn_int4(weight, method.group_size)
    return nf4(weight) if method.weights == "nf4" else weight


def _activation(method: Simulated, inputs: Sequence[Tensor], full_mask: bool) -> Activation | None:
    if method.activations == "none":
        return None
    if method.activations == "token":
        return partial(activations.per_token, clip=method.clip)
    if method.activations == "token-group":
        return partial(activations.per_token_group, group_size=method.activation_group)
    if method.activations == "static-tensor":
        return partial(activations.quantize, scale=activations.scale_of(activations.channel_peak(inputs).amax()))
    return oracle.fit(inputs, full_mask)


def _replace_input(activation: Activation, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (activation(inputs[0]), *inputs[1:])
