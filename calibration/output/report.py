"""Makes the report beside the weights: settings, data, and calibration's figures of each layer."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from morphoquant_vllm.format.schema import QuantizationSpec

if TYPE_CHECKING:
    from calibration.quantize.layer_report import ExpertsFigures, LayerFigures
    from calibration.settings.recipe import Recipe

REPORT_FORMAT = 1
# Up to this share of experts without tokens is not warned of.
EMPTY_SHARE = 0.05
PACKAGE = "morphoquant-vllm"


def package_version(name: str = PACKAGE) -> str:
    """Version of an installed package; "unknown" if it runs from a source tree."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def make_report(
    recipe: Recipe,
    spec: QuantizationSpec,
    layers: Mapping[str, LayerFigures],
    samples: int,
    token_counts: Mapping[int, int],
    experts: Mapping[str, ExpertsFigures],
) -> dict[str, Any]:
    """The JSON object of REPORT_FILE, the same for the same run (no times, no paths)."""
    # Without these settings, a checkpoint's bytes are the same as before they existed.
    unused = {name for name in ("towers", "decoder", "bits_budget") if not getattr(recipe, name)}
    unused |= {"budget"} if recipe.budget == "equal" else set()
    settings = recipe.model_dump(mode="json", exclude=unused)
    return {
        "format": REPORT_FORMAT,
        "settings": {**settings, "tensor_parallel": spec.tensor_parallel},
        "data": {"samples": samples, "tokens": {spec.rows[row]: count for row, count in token_counts.items()}},
        "escape_rate": overall_escape_rate(spec, layers, experts, sum(token_counts.values())),
        "layers": {name: asdict(figures) for name, figures in layers.items()},
        **({"experts": {name: asdict(figures) for name, figures in experts.items()}} if experts else {}),
        "versions": {
            PACKAGE: package_version(),
            "python": platform.python_version(),
            "torch": package_version("torch"),
            "transformers": package_version("transformers"),
        },
    }


def overall_escape_rate(
    spec: QuantizationSpec, layers: Mapping[str, LayerFigures], experts: Mapping[str, ExpertsFigures], tokens: int
) -> float:
    """Codes outside [-8, 7] as a fraction of the decoder's codes; codes of a shared input count once.

    A tower's codes are excluded, because its patches are not these tokens: a picture has four patches per token. An
    expert's codes count for the tokens that chose it, of `tokens` in all.
    """
    first = [names[0] for names in spec.shared_inputs().values() if not spec.layers[names[0]].fixed_row]
    parts = [(layers[name].escape_rate["all"], float(spec.layers[name].in_features)) for name in first]
    for name, figures in experts.items():
        settings = spec.experts[name]
        parts.append((figures.input.escape_rate["all"], settings.in_features))
        for rate, count in zip(figures.down_escape_rate, figures.tokens, strict=True):
            parts.append((rate or 0.0, settings.intermediate_features * count / tokens))
    return sum(rate * codes for rate, codes in parts) / sum(codes for _, codes in parts)


def empty_experts(experts: Mapping[str, ExpertsFigures]) -> str | None:
    """A sentence about experts that no drawn token chose; None if they are at most EMPTY_SHARE of all."""
    count = sum(len(figures.tokens) for figures in experts.values())
    none = sum(figures.none for figures in experts.values())
    if none <= EMPTY_SHARE * count:
        return None
    return (
        f"{none} of {count} experts ({none / count:.0%}) were chosen by no drawn token, and their weights are rounded "
        "plainly; give more or more varied data, with a larger --max-samples and --sample-tokens"
    )
