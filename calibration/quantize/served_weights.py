"""The weights of the linears that share an input, rounded to the stored and served form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.group_search import Ordered
from calibration.quantize.moments import Moments, fitting_shrinkage, regress
from calibration.quantize.output_metric import round_in_runs
from calibration.quantize.rounding import fitting_damping, order_of, quantize_compensated, quantize_two_level
from calibration.quantize.two_level import nearest
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, LayerSpec
from morphoquant_vllm.host_memory import release_freed_memory
from morphoquant_vllm.numerics import weights

# Smallest importance of a channel, as a fraction of the mean. Without it, a channel whose codes were all 0 in
# calibration would get arbitrary weights.
IMPORTANCE_FLOOR = 1e-4
# Names under which codes and scales are stored, in the order in which rounding gives them.
_STORED = {
    GROUP_SCHEME: ("weight_codes", "weight_scale"),
    TWO_LEVEL_SCHEME: ("weight_codes", "weight_level", "weight_channel_scale"),
}


@dataclass(frozen=True)
class ServedWeights:
    """Rounded weights of N output channels, K in channel order."""

    # Packed codes and scales by their names in the checkpoint; the first dimension of each is N.
    stored: dict[str, Tensor]
    # The dequantized weights that multiply codes of activations, float32 [N, K].
    matrix: Tensor


@dataclass(frozen=True)
class _Fit:
    """What is rounded: the fitted weights [n, K] of some output channels."""

    fitted: Tensor
    # The second moments of the codes [K, K], and the damping of their diagonal in rounding.
    hessian: Tensor
    damping: float


def round_weights(
    matrix: Tensor,
    step: Tensor,
    moments: Moments,
    layer: LayerSpec,
    recipe: Recipe,
    processes: Processes,
    metrics: Sequence[Tensor] = (),
) -> ServedWeights:
    """Round the 16-bit weights matrix [N, K] times the activation steps [K], both in channel order.

    Each process rounds some of the output channels. Overwrites the second moments in `moments`. With `metrics` [n, n]
    of the outputs of the layers that matrix is made of (output_metric), rounding lets their errors cancel each other.
    """
    channels, owners = processes.share(matrix.shape[0]), processes.owners(matrix.shape[0])
    absorbed = weights.absorb(matrix[channels], step)
    # The runs of tokens are done. Their memory is needed for the second moments.
    release_freed_memory()
    fit = _fit(absorbed, moments, channels, recipe)
    del absorbed
    if metrics and _compensates(layer, recipe):
        parts = _round_jointly(fit, processes.all_gather_rows(fit.fitted, owners), metrics, layer, recipe, processes)
    else:
        local = _round(fit.fitted, fit.hessian, layer, recipe, fit.damping)
        parts = tuple(processes.all_gather_rows(part, owners) for part in local)
    del fit
    codes, *scales = parts
    if layer.weight_bits == 4:
        codes = weights.pack(codes)
    stored = dict(zip(_STORED[layer.scale_scheme], (codes, *scales), strict=True))
    return ServedWeights(stored, weights.dequantize_weight(codes, *scales))


def _compensates(layer: LayerSpec, recipe: Recipe) -> bool:
    """Whether rounding compensates for errors: those of 8-bit weights are too small."""
    return recipe.rounding == "compensated" and layer.weight_bits == 4


def _fit(absorbed: Tensor, moments: Moments, channels: slice, recipe: Recipe) -> _Fit:
    """The fit of the 16-bit weights times steps, `absorbed`, of these output channels."""
    hessian, code_output = moments.take_centred(channels)
    damping = fitting_damping(hessian.shape[0], moments.tokens)
    if not recipe.regression:
        return _Fit(absorbed, hessian, damping)
    shrinkage = fitting_shrinkage(recipe.shrinkage, hessian.shape[0], moments.tokens)
    return _Fit(regress(hessian, code_output, absorbed, shrinkage), hessian, damping)


def _round_jointly(
    fit: _Fit, fitted: Tensor, metrics: Sequence[Tensor], layer: LayerSpec, recipe: Recipe, processes: Processes
) -> tuple[Tensor, ...]:
    """Codes and scales, as from `_round`, of all output channels, whose weights are `fitted` [N, K]."""
    taken = order_of(fit.hessian, layer.group_size, fit.damping)

    def rounded(aimed: Tensor) -> tuple[Tensor, ...]:
        return _round(aimed, fit.hessian, layer, recipe, fit.damping, taken)

    return round_in_runs(fitted, metrics, rounded, _dequantized, processes)


def _dequantized(int4: Tensor, *scales: Tensor) -> Tensor:
    """The weights [n, K] of codes int8 [n, K] and scales as from `_round`."""
    return weights.dequantize_weight(weights.pack(int4), *scales)


def _round(
    fitted: Tensor, hessian: Tensor, layer: LayerSpec, recipe: Recipe, damping: float, taken: Ordered | None = None
) -> tuple[Tensor, ...]:
    """Codes int8 [n, K] of the weights `fitted` for codes of the second moments `hessian`, and their scales.

    Scales are bfloat16 [n, K/G]. With two-level scales they are levels uint8 [n, K/G] and channel scale float32 [n].
    `taken`: as from rounding.order_of, for several calls.
    """
    if layer.weight_bits == 8:
        # The error of 8-bit weights is far below that of the activations: there is nothing to compensate.
        return weights.quantize_int8(fitted, layer.group_size)
    two_level = layer.scale_scheme == TWO_LEVEL_SCHEME
    if recipe.rounding == "compensated":
        if two_level:
            return quantize_two_level(fitted, hessian, layer.group_size, recipe.scale_levels, damping, taken)
        return quantize_compensated(fitted, hessian, layer.group_size, damping, taken)
    importance = channel_importance(hessian.diagonal())
    if two_level:
        return nearest(fitted, importance, layer.group_size, recipe.scale_levels)
    return weights.quantize_int4(fitted, importance, layer.group_size)


def channel_importance(energy: Tensor) -> Tensor:
    """How much a squared error of each channel's weights counts, float32 [K], by the mean square of its codes [K]."""
    mean = float(energy.mean())
    return energy.clamp(min=IMPORTANCE_FLOOR * mean) if mean > 0 else torch.ones_like(energy)
