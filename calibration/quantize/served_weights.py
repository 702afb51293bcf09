"""The weights of the linears that share an input, rounded to the stored and served form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.held_out import HeldMoments, regress_by_held
from calibration.quantize.moments import Moments, regress
from calibration.quantize.rounding import quantize_compensated, quantize_two_level
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


def round_weights(
    matrix: Tensor,
    step: Tensor,
    moments: Moments,
    layer: LayerSpec,
    recipe: Recipe,
    processes: Processes,
    held: Moments | None = None,
) -> ServedWeights:
    """Round the 16-bit weights matrix [N, K] times the activation steps [K], both in channel order.

    Each process rounds some of the output channels. Overwrites the second moments in `moments` and `held`. The latter
    are those of held-out tokens, which choose the strength of the regression; None: the recipe's.
    """
    channels = processes.share(matrix.shape[0])
    absorbed = weights.absorb(matrix[channels], step)
    # The runs of tokens are done. Their memory is needed for the second moments.
    release_freed_memory()
    own = _round(_aim(absorbed, moments, channels, recipe, processes, held), layer, recipe)
    del absorbed
    owners = processes.owners(matrix.shape[0])
    int4, *scales = (processes.all_gather_rows(part, owners) for part in own)
    packed = weights.pack(int4)
    stored = dict(zip(_STORED[layer.scale_scheme], (packed, *scales), strict=True))
    return ServedWeights(stored, weights.dequantize_weight(packed, *scales))


def _aim(
    absorbed: Tensor,
    moments: Moments,
    channels: slice,
    recipe: Recipe,
    processes: Processes,
    held: Moments | None,
) -> tuple[Tensor, Tensor]:
    """The weights [n, K] for codes that rounding aims at, and the second moments [K, K] of the codes.

    `absorbed` [n, K] are the 16-bit weights of these output channels, times steps.
    """
    hessian, code_output = moments.take_centred(channels)
    if not recipe.regression:
        return absorbed, hessian
    if held is None:
        return regress(hessian, code_output, absorbed, recipe.shrinkage), hessian
    of_held = HeldMoments.of(held, channels)
    return regress_by_held(hessian, code_output, absorbed, recipe.shrinkage, of_held, processes), hessian


def _round(aim: tuple[Tensor, Tensor], layer: LayerSpec, recipe: Recipe) -> tuple[Tensor, ...]:
    """int4 codes int8 [n, K] of weights and their scales; `aim` as from `_aim`.

    Scales are bfloat16 [n, K/G]. With two-level scales they are levels uint8 [n, K/G] and channel scale float32 [n].
    """
    target, hessian = aim
    two_level = layer.scale_scheme == TWO_LEVEL_SCHEME
    if recipe.rounding == "compensated":
        if two_level:
            return quantize_two_level(target, hessian, layer.group_size, recipe.scale_levels)
        return quantize_compensated(target, hessian, layer.group_size)
    energy = hessian.diagonal().clone()
    mean = float(energy.mean())
    importance = energy.clamp(min=IMPORTANCE_FLOOR * mean) if mean > 0 else torch.ones_like(energy)
    if two_level:
        return nearest(target, importance, layer.group_size, recipe.scale_levels)
    return weights.quantize_int4(target, importance, layer.group_size)
