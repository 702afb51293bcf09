"""What keeping values in float32 leaves of the drift in bfloat16: a simulation with transformers, of a Llama.

A run beside the plain one differs by one of two changes. *Two ranks* add their halves of a row-parallel linear's sum
after each was rounded to bfloat16; here a sum is split at random into two halves. *Fused operations* round once where
separate ones round twice: in RMSNorm, and in silu(gate) * up. All other sums stay in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.drift.figures import gaps
from morphoquant_vllm.hf.linear import MorphoQuantLinear
from morphoquant_vllm.numerics.activation import act_quant

ROW_PARALLEL = ("o_proj", "down_proj")
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
# One linear of each quantized input.
INPUTS = ("q_proj", "o_proj", "gate_proj", "down_proj")
CHANGES = ("two ranks", "fused operations")


@dataclass(frozen=True)
class Kept:
    """What stays in float32: the residual, the quantizer's input after a norm, the halves of two ranks."""

    residual: bool = False
    quantizer_input: bool = False
    halves: bool = False


KEPT = {
    "nothing, as served": Kept(),
    "the residual": Kept(residual=True),
    "the residual and the quantizer's input": Kept(residual=True, quantizer_input=True),
    "the halves of two ranks": Kept(halves=True),
    "all three": Kept(residual=True, quantizer_input=True, halves=True),
}
# 16-bit linears take 16-bit inputs.
SIXTEEN_BIT = ("nothing, as served", "the residual", "the halves of two ranks")


def residual_drift(
    source: Path, directory: Path, prompts: Sequence[Sequence[int]]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By model, change and what stays in float32: log probabilities apart from the plain run, share of moved codes."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name, path, kept in (("16 bit", source, SIXTEEN_BIT), ("MorphoQuant", directory, KEPT)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for module in row_parallel(model):
            module.float()
        found[name] = {change: {} for change in CHANGES}
        for entry in kept:
            plain = ask(model, KEPT[entry], prompts)
            for change in CHANGES:
                found[name][change][entry] = apart(plain, ask(model, KEPT[entry], prompts, change))
    return found


Answer = tuple[list[float], list[Tensor]]


def apart(one: Answer, other: Answer) -> dict[str, float]:
    """`gaps` of two runs' log probabilities, and the share of their codes that differ if there are any."""
    (logprobs, codes), (others, moved) = one, other
    figures = gaps(logprobs, others)
    if codes:
        differ = sum(int((before != after).sum()) for before, after in zip(codes, moved, strict=True))
        figures["moved codes"] = differ / sum(before.numel() for before in codes)
    return figures


def ask(model: PreTrainedModel, kept: Kept, prompts: Sequence[Sequence[int]], change: str = "") -> Answer:
    """Log probabilities of every token but the first of each prompt, and the codes of every quantized input."""
    found: list[float] = []
    codes: list[Tensor] = []
    with keeping(model, kept, change, codes), torch.no_grad():
        for tokens in prompts:
            ids = torch.tensor(tokens)
            logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
            found += logprobs[:-1].gather(1, ids[1:, None]).flatten().tolist()
    return found, codes


@contextmanager
def keeping(model: PreTrainedModel, kept: Kept, change: str, codes: list[Tensor]) -> Iterator[None]:
    """Run a Llama in bfloat16 but for what is `kept`, with one of CHANGES or none; its codes join `codes`."""
    ranks = torch.Generator().manual_seed(0) if change == "two ranks" else None
    fused = change == "fused operations"
    residual = torch.float32 if kept.residual else torch.bfloat16
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [(model.get_input_embeddings(), _cast(residual))]
    before: list[tuple[nn.Module, Callable[..., Any]]] = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("norm"):
            to_head = last == "norm"
            output = torch.float32 if kept.quantizer_input and not to_head else torch.bfloat16
            hooks.append((module, partial(_norm, fused, output)))
        elif last == "act_fn" and fused:
            hooks.append((module, lambda module, inputs, output: nn.functional.silu(inputs[0].float())))
        elif last in COLUMN_PARALLEL:
            hooks.append((module, _cast(torch.bfloat16)))
        elif last in ROW_PARALLEL:
            before.append((module, _round_and_widen))
            hooks.append((module, partial(_add_ranks, ranks, kept)))
        if last in INPUTS and isinstance(module, MorphoQuantLinear):
            before.append((module, partial(_note_codes, codes)))
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    handles += [module.register_forward_pre_hook(hook) for module, hook in before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_parallel(model: PreTrainedModel) -> list[nn.Module]:
    """The linears whose inputs are cut among ranks."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in ROW_PARALLEL]


def split_sum(y: Tensor, ranks: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The sum of two halves of y, float32, each rounded to `dtype`, which the sum has, too."""
    # Halves of independent sums are about as large as the whole.
    difference = torch.randn(y.shape, generator=ranks) * y.std() / 2
    return (y / 2 + difference).to(dtype) + (y / 2 - difference).to(dtype)


def _cast(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A hook that gives a module's output another dtype."""
    return lambda module, inputs, output: output.to(dtype)


def _norm(fused: bool, dtype: torch.dtype, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output of RMSNorm in `dtype`; of transformers' norm, which rounds before it multiplies, or rounded once."""
    if not fused:
        return output.to(dtype)
    x = inputs[0].float()
    scale = x.square().mean(-1, keepdim=True) + norm.variance_epsilon
    return (x * scale.rsqrt() * norm.weight.float()).to(dtype)  # type: ignore[operator]


def _round_and_widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The input of a row-parallel linear is of bfloat16, its sum of float32."""
    return (inputs[0].bfloat16().float(), *inputs[1:])


def _add_ranks(ranks: torch.Generator | None, kept: Kept, module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    halves = torch.float32 if kept.halves else torch.bfloat16
    total = y.to(halves) if ranks is None else split_sum(y, ranks, halves)
    return total if kept.residual else total.bfloat16()


def _note_codes(codes: list[Tensor], linear: MorphoQuantLinear, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0].reshape(-1, inputs[0].shape[-1])
    codes.append(act_quant(x, linear.modality_of(x), linear.activation()).to(torch.int16))
