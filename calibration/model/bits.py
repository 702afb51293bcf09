"""The bits of each linear's weights within a mean over the model, the recipe's `bits_budget`. Pure.

A *form* is how the weights of an input's linears are kept: in 4 bits, in 8 bits, or as in the 16-bit model. A weight's
bits are those of its code and its share of the scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

FORMS = (4, 8, 16)
LARGEST_BUDGET = 8.0


@dataclass(frozen=True)
class Candidate:
    """The linears of one input: the number of their weights, and by form the bits of a weight and the loss.

    The loss is an estimate of the error that the form adds to the model's output.
    """

    weights: int
    bits: Mapping[int, float]
    loss: Mapping[int, float]


def in_form(layer: LayerSpec, form: int) -> LayerSpec | None:
    """The settings of a linear in a form; None if it stays in 16 bit."""
    if form == 16:
        return None
    return layer if form == 4 else replace(layer, weight_bits=8, scale_scheme=GROUP_SCHEME)


def stored_bits(layer: LayerSpec | None) -> float:
    """Bits of a weight of a linear, with its share of the scales; None is a linear in 16 bit."""
    if layer is None:
        return 16.0
    if layer.scale_scheme == TWO_LEVEL_SCHEME:
        return layer.weight_bits + 8 / layer.group_size + 32 / layer.in_features
    return layer.weight_bits + 16 / layer.group_size


def mean_bits(layers: Iterable[LayerSpec]) -> float:
    """Mean bits of a weight over quantized linears."""
    sizes = [(layer.in_features * layer.out_features, stored_bits(layer)) for layer in layers]
    return sum(weights * bits for weights, bits in sizes) / sum(weights for weights, _ in sizes)


def decoder_linears(spec: QuantizationSpec, prefix: str) -> dict[str, LayerSpec]:
    """The quantized linears over which the mean runs: those of the decoder's blocks, experts' included."""
    return {name: layer for name, layer in spec.linears.items() if name.startswith(f"{prefix}.")}


def check_bits_budget(spec: QuantizationSpec, prefix: str, recipe: Recipe) -> None:
    """Refuse a `bits_budget` outside the possible range."""
    if recipe.bits_budget is None:
        return
    least = mean_bits(decoder_linears(spec, prefix).values())
    if not least <= recipe.bits_budget <= LARGEST_BUDGET:
        raise MorphoQuantError(
            f"bits_budget = {recipe.bits_budget:g}: must be {_rounded_up(least):.3f} to {LARGEST_BUDGET:g}, the mean "
            "bits of a weight with its share of the scales; leave it out for 4-bit weights alone"
        )


def _rounded_up(bits: float) -> float:
    """Three digits that are themselves an allowed budget."""
    return -(-bits * 1000 // 1) / 1000


def extra_bytes(spec: QuantizationSpec, prefix: str, recipe: Recipe) -> int:
    """Bytes that a budget may add to a checkpoint of 4-bit weights."""
    if recipe.bits_budget is None:
        return 0
    layers = decoder_linears(spec, prefix).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return int((recipe.bits_budget - mean_bits(layers)) * weights / 8)


def spend(candidates: Mapping[str, Candidate], spare: float) -> dict[str, int]:
    """The form of each candidate: wider forms where a bit lowers the loss most, for at most `spare` bits in all.

    A greedy choice over the steps of each candidate's convex hull, in the order of loss per bit. A step that no longer
    fits is left out, and smaller ones may follow. Equal steps keep the order of the candidates.
    """
    steps = [
        (gain, number, name, form, cost)
        for number, (name, candidate) in enumerate(candidates.items())
        for gain, form, cost in _steps(candidate)
    ]
    forms = dict.fromkeys(candidates, FORMS[0])
    left: set[str] = set()
    for _, _, name, form, cost in sorted(steps, key=lambda step: (-step[0], step[1], step[3])):
        if name in left:
            continue
        if cost > spare:
            left.add(name)
            continue
        forms[name], spare = form, spare - cost
    return forms


def _steps(candidate: Candidate) -> list[tuple[float, int, float]]:
    """Loss per bit, form and further bits of each step from 4 bits on; later steps give less for a bit."""

    def step(start: int, form: int) -> tuple[float, int, float]:
        cost = candidate.weights * (candidate.bits[form] - candidate.bits[start])
        return (candidate.loss[start] - candidate.loss[form]) / cost, form, cost

    first, whole, second = step(4, 8), step(4, 16), step(8, 16)
    found = [first, second] if first[0] >= second[0] else [whole]
    return [entry for entry in found if entry[0] > 0]


def apply(spec: QuantizationSpec, forms: Mapping[str, int]) -> QuantizationSpec:
    """The settings with the linears of each input of `forms` in its form; those of other inputs stay."""
    layers = {
        name: found
        for name, layer in spec.layers.items()
        if (found := in_form(layer, forms.get(layer.shared_input, 4))) is not None
    }
    return replace(spec, layers=layers)
