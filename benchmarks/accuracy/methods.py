"""Every method of the benchmark, in one dict. A name stands for weights and activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class Simulated:
    """A method whose rounding is simulated in float32 on the transformers model."""

    # none, rtn, gptq or nf4
    weights: str = "none"
    group_size: int = 64
    act_order: bool = False
    # none, static-tensor, token, token-group or oracle
    activations: str = "none"
    activation_group: int = 64
    # Fraction of a token's largest magnitude that the codes can represent.
    clip: float = 1.0
    # none, hadamard (every linear's input), smooth (inputs that follow a norm) or smooth-all (every linear's input)
    transform: str = "none"
    smooth_alpha: float = 0.5

    @property
    def calibrated(self) -> bool:
        """Whether calibration data changes the result."""
        return self.weights == "gptq" or self.activations in ("static-tensor", "oracle") or "smooth" in self.transform


@dataclass(frozen=True)
class Served:
    """A method that vLLM serves: the checkpoint of `morphoquant calibrate`, or the 16-bit model."""

    quantized: bool = True
    # Overrides of the calibration recipe's defaults.
    recipe: Mapping[str, Any] = field(default_factory=dict)


Method = Simulated | Served

METHODS: dict[str, Method] = {
    "16bit": Simulated(),
    "w4a16-rtn-g64": Simulated("rtn"),
    "w4a16-rtn-g32": Simulated("rtn", 32),
    "w4a16-nf4": Simulated("nf4"),
    "w4a16-gptq-g64": Simulated("gptq"),
    "w4a16-gptq-g32": Simulated("gptq", 32),
    "w4a4-static-tensor": Simulated("rtn", activations="static-tensor"),
    "w4a4-token": Simulated("rtn", activations="token"),
    "w4a4-token-group": Simulated("rtn", activations="token-group"),
    "w4a4-smoothquant": Simulated("rtn", activations="token", transform="smooth"),
    "w4a4-smoothquant-all": Simulated("rtn", activations="token", transform="smooth-all"),
    # QuaRot clips activations at 0.9 of their largest magnitude.
    "w4a4-hadamard": Simulated("rtn", activations="token", clip=0.9, transform="hadamard"),
    "w4a4-hadamard-gptq": Simulated("gptq", activations="token", clip=0.9, transform="hadamard"),
    "oracle-rtn-g64": Simulated("rtn", activations="oracle"),
    "oracle-nf4": Simulated("nf4", activations="oracle"),
    "served-16bit": Served(quantized=False),
    "served": Served(),
    # Ablations: each leaves out or changes one component of the calibration.
    "served-no-mask": Served(recipe={"escape_budget": 0.0}),
    "served-budget-0.5": Served(recipe={"escape_budget": 0.005}),
    "served-budget-1": Served(recipe={"escape_budget": 0.01}),
    "served-budget-5": Served(recipe={"escape_budget": 0.05}),
    "served-no-massive-row": Served(recipe={"massive_row": False}),
    "served-no-modality-rows": Served(recipe={"modality_rows": False}),
    "served-budget-0.5-no-modality-rows": Served(recipe={"escape_budget": 0.005, "modality_rows": False}),
    "served-no-mask-no-modality-rows": Served(recipe={"escape_budget": 0.0, "modality_rows": False}),
    "served-no-regression": Served(recipe={"regression": False}),
    "served-nearest": Served(recipe={"regression": False, "rounding": "nearest"}),
    # The reference's mask and range search instead of the budgeted one, and its mask without its search.
    "served-reference-grid": Served(recipe={"grid": "reference"}),
    "served-no-search": Served(recipe={"grid": "reference", "lower": 0.999}),
    "served-g64": Served(recipe={"group_size": 64}),
    "served-group": Served(recipe={"scale_levels": 0}),
}


# A model of one modality has no modality-specific rows.
OMNI_ONLY = ("served-no-modality-rows", "served-budget-0.5-no-modality-rows", "served-no-mask-no-modality-rows")


def known_methods(benchmark: str) -> list[str]:
    """Names of a benchmark's methods."""
    return [name for name in METHODS if benchmark == "omni" or name not in OMNI_ONLY]


def choose(kind: str, wanted: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """The wanted names, or all known ones for None; an unknown one raises MorphoQuantError with the known ones."""
    known = list(known)
    chosen = known if wanted is None else list(dict.fromkeys(wanted))
    for name in chosen:
        if name not in known:
            raise MorphoQuantError(f"unknown {kind} '{name}'; known: {', '.join(known)}")
    if not chosen:
        raise MorphoQuantError(f"no {kind} is named; known: {', '.join(known)}")
    return chosen
