"""What the calibration of a block made, and the warnings about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from calibration.data.token_choice import DrawnTokens
from calibration.quantize.experts import QuantizedExperts
from calibration.quantize.layer import QuantizedLayer
from calibration.quantize.layer_report import escape_warning
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.layers import experts_input
from morphoquant_vllm.format.schema import QuantizationSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockResult:
    """One finished block; `loss` is the mean output error of its layers (None if no layer is quantized)."""

    index: int
    count: int
    layers: dict[str, QuantizedLayer]
    loss: float | None
    # The kept tensors of each input's distribution, by the input's name.
    distributions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # By the name of the list of experts.
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)
    # None if no attention was seen.
    attention: AttentionRange | None = None


@dataclass(frozen=True)
class LayerBegins:
    """The input of a block that is quantized next, by the name of its fused layer."""

    index: int
    count: int
    layer: str


@dataclass
class Quantized:
    """What a block's calibration has made so far; the fields of BlockResult."""

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    distributions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)
    attention: AttentionRange | None = None

    def result(self, index: int, count: int) -> BlockResult:
        """The finished block: block `index` of `count`."""
        errors = [layer.figures.output_error for layer in self.layers.values()]
        errors += [error for layer in self.experts.values() for error in layer.figures.errors]
        loss = sum(errors) / len(errors) if errors else None
        return BlockResult(index, count, self.layers, loss, self.distributions, self.experts, self.attention)


def warn_of_escapes(
    found: Quantized, tokens: DrawnTokens, spec: QuantizationSpec, recipe_of: Callable[[str], Recipe]
) -> None:
    """Log each input of a block whose escape rate is far above its budget; `recipe_of` gives an input's recipe."""
    drawn = {spec.rows[row]: int((tokens.modality == row).sum()) for row in tokens.counts}
    figures_of = {spec.layers[name].shared_input: layer.figures for name, layer in found.layers.items()}
    figures_of |= {experts_input(name): layer.figures.input for name, layer in found.experts.items()}
    for shared_input, figures in figures_of.items():
        warning = escape_warning(shared_input, figures, recipe_of(shared_input), drawn)
        if warning:
            logger.warning("%s", warning)
