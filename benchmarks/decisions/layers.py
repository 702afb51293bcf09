"""One way to quantize the linears of an input, and the errors of their outputs on tokens outside calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.decisions.inputs import LinearInput
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.data.token_choice import choose_tokens
from calibration.quantize import step_search
from calibration.quantize.layer import DrawnInput, quantize_input
from calibration.quantize.observation import InputCollector
from calibration.settings.recipe import read_recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import Grid, escapes
from morphoquant_vllm.numerics.limits import GROUP_SIZES

CENTRES = ("real", "integer", "none")


@dataclass(frozen=True)
class Variant:
    """The varied settings; all others are the recipe's defaults."""

    group_size: int = 32
    scale_levels: int = 0
    # "real"; "integer": a whole number of steps, as a zero point is; "none": 0 everywhere.
    centre: str = "real"
    massive_row: bool = True


@dataclass(frozen=True)
class Result:
    """One linear quantized in one way, measured on held-out tokens."""

    layer: str
    # Name of the shared input.
    input_name: str
    block: int | None
    in_features: int
    out_features: int
    variant: Variant
    # Root of squared error over squared output, of tokens that are not massive candidates, and of candidates (None if
    # there are none).
    error: float
    massive_error: float | None
    # Codes outside [-8, 7] as a fraction of all.
    escape_rate: float
    # Channels with a centre other than 0.
    centred_share: float
    massive_tokens: int
    # Fraction of the candidates that took the massive row; and the same of all other tokens.
    found: float | None
    false: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, the variant's fields beside the others."""
        fields = asdict(self)
        return {"layer": fields.pop("layer"), **fields.pop("variant"), **fields}


def allows(in_features: int, group_size: int) -> bool:
    """Whether the format allows groups of this size in a linear with `in_features` inputs."""
    return group_size in GROUP_SIZES and in_features % group_size == 0


@torch.no_grad()
def measure(inputs: LinearInput, variant: Variant, seed: int = 0) -> list[Result]:
    """Quantize the linears of one input and measure each; MorphoQuantError if the variant does not fit."""
    if variant.centre not in CENTRES:
        raise MorphoQuantError(f"centre '{variant.centre}' is unknown; known: {', '.join(CENTRES)}")
    settings = {name: getattr(variant, name) for name in ("group_size", "scale_levels", "massive_row")}
    # One layer: all tokens fit its weights.
    recipe = read_recipe(overrides={"effort": "fast"} | settings | {"seed": seed})
    layers = {
        name: LayerSpec(
            *(inputs.in_features, weight.shape[0], variant.group_size, inputs.parallel, inputs.name),
            scale_scheme=recipe.scale_scheme,
        )
        for name, weight in inputs.weights.items()
    }
    spec = QuantizationSpec(layers=layers)
    count = inputs.calibration.shape[0]
    text, massive_row = spec.rows.index("text"), len(spec.rows) - 1
    tokens = choose_tokens([torch.full((count,), text)], count, recipe.modality_balance, seed)
    collector = InputCollector(inputs.name)
    rows = torch.where(inputs.calibration_outlying, massive_row, text)
    collector.add(inputs.calibration, rows, tokens.positions[0])
    sample = DrawnInput(collector.observation(), inputs.calibration, inputs.calibration_outlying)
    with _centres(variant.centre):
        quantized = quantize_input(sample, tokens, inputs.weights, spec, recipe)
    results = []
    outlying = inputs.held_out_outlying
    for name, weight in inputs.weights.items():
        tensors = quantized[name].tensors
        served = ServedLinear(tensors, None, TokenRows(spec.any_row), torch.device("cpu"))
        codes, row = served.codes(inputs.held_out)
        taken = row == massive_row
        error = (served(inputs.held_out) - inputs.held_out @ weight.T).square().sum(1)
        power = (inputs.held_out @ weight.T).square().sum(1)
        results.append(
            Result(
                layer=name,
                input_name=inputs.name,
                block=inputs.block,
                in_features=inputs.in_features,
                out_features=weight.shape[0],
                variant=variant,
                error=_relative(error, power, ~outlying),
                massive_error=_relative(error, power, outlying) if bool(outlying.any()) else None,
                escape_rate=float(escapes(codes).float().mean()),
                centred_share=float((tensors["centre"][spec.any_row] != 0).float().mean()),
                massive_tokens=int(outlying.sum()),
                found=float(taken[outlying].float().mean()) if bool(outlying.any()) else None,
                false=float(taken[~outlying].float().mean()),
            )
        )
    return results


def _relative(error: Tensor, power: Tensor, which: Tensor) -> float:
    return float((error[which].double().sum() / power[which].double().sum()).sqrt())


@contextmanager
def _centres(kind: str) -> Iterator[None]:
    """Calibrate with centres of this kind.

    They are patched: the recipe lacks this setting, because the product does not offer it. "integer" gets the best
    possible conditions: every candidate step is judged with its centre, rounded to an integer multiple of that step.
    """
    with ExitStack() as stack:
        if kind == "none":
            stack.enter_context(patch.object(step_search, "centres", lambda x: torch.zeros(x.shape[1])))
        elif kind == "integer":
            stack.enter_context(patch.object(step_search, "losses", _whole_losses(step_search.losses)))
            stack.enter_context(patch.object(step_search, "budget_grid", _whole_grid(step_search.budget_grid)))
        yield


def _whole(centre: Tensor, step: Tensor) -> Tensor:
    return (centre / step).round() * step


def _whole_losses(losses: Callable[..., step_search.Losses]) -> Callable[..., step_search.Losses]:
    def judged(
        parts: Iterable[tuple[Tensor, ...]], centre: Tensor, candidates: Tensor, importance: Tensor, *, escapes: bool
    ) -> step_search.Losses:
        chunks = list(parts)
        each = [losses(chunks, _whole(centre, step), step[None], importance, escapes=escapes) for step in candidates]
        return step_search.Losses(torch.cat([one.error for one in each]), torch.cat([one.escape for one in each], 1))

    return judged


def _whole_grid(budget_grid: Callable[..., Grid]) -> Callable[..., Grid]:
    def rounded(*arguments: Any) -> Grid:
        grid = budget_grid(*arguments)
        return grid._replace(centre=_whole(grid.centre, grid.step))

    return rounded
