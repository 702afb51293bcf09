"""Every method of the benchmark, in one dict. A name stands for weights and activations."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calibration.settings.recipe import FAST_SAMPLE_TOKENS, read_recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES, MAX_LEVEL

# Ways of rounding weights in which each block sees the outputs of the quantized blocks before it.
SEQUENTIAL = ("gptq", "ours")


@dataclass(frozen=True)
class Simulated:
    """A method whose rounding is simulated in float32 on the transformers model."""

    # none, rtn, gptq, nf4, or ours: calibration's own rounding, on activations of 16 bit
    weights: str = "none"
    group_size: int = 64
    # Levels of two-level scales of `ours`; 0: a scale for each group.
    levels: int = 0
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
        fitted = self.activations in ("static-tensor", "oracle") or "smooth" in self.transform
        return fitted or self.weights in SEQUENTIAL


@dataclass(frozen=True)
class Served:
    """A method that vLLM serves: the checkpoint of `morphoquant calibrate`, or the 16-bit model."""

    quantized: bool = True
    # Overrides of the calibration recipe's defaults.
    recipe: Mapping[str, Any] = field(default_factory=dict)
    # The mask's threshold: this many standard deviations above the mean dispersion of all channels of the network.
    # None: the recipe's, for each layer.
    network_tau: float | None = None


@dataclass(frozen=True)
class Part:
    """One part of a served checkpoint in the 16-bit model, in float32 by transformers, on the torch reference."""

    # activations or weights: of every linear, with the other in 16 bit; or a name of KINDS: both, of these linears
    part: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """Weights rounded by another quantizer in an environment of its own, on activations of 16 bit."""

    # A name of peers.environment.SCRIPTS, and the version of the package.
    tool: str
    version: str
    group_size: int
    # The quantizer's own options.
    options: Mapping[str, Any] = field(default_factory=dict)


Method = Simulated | Served | Part | Peer

# Linears of a decoder's block.
KINDS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate-up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}

# The composite loss of arXiv 2606.04349: squared error, and this weight of the cosine.
COSINE_WEIGHT = 0.75
# The mask's threshold in standard deviations: the recipe's own default, and one that no channel reaches.
TAU, NO_MASK_TAU = 2.0, 1e6

# AutoRound's release, and its default number of steps a block, which ends within an hour on two cores for these models.
AUTO_ROUND, AUTO_ROUND_OPTIONS = "0.16.1", {"iters": 200}
# Its recipe "light": a quarter of the steps, with a rate of its own. SmolLM2 would take hours with the default.
AUTO_ROUND_LIGHT = {"iters": 50, "lr": 5e-3}
# GPTQModel's release; its defaults otherwise.
GPTQMODEL = "7.7.0"

FAST: Mapping[str, Any] = {"effort": "fast"}

METHODS: dict[str, Method] = {
    "16bit": Simulated(),
    "w4a16-rtn-g64": Simulated("rtn"),
    "w4a16-rtn-g32": Simulated("rtn", 32),
    "w4a16-rtn-g128": Simulated("rtn", 128),
    "w4a16-nf4": Simulated("nf4"),
    "w4a16-gptq-g64": Simulated("gptq"),
    "w4a16-gptq-g32": Simulated("gptq", 32),
    "w4a16-gptq-g128": Simulated("gptq", 128),
    "w4a16-auto-round-g32": Peer("auto-round", AUTO_ROUND, 32, AUTO_ROUND_OPTIONS),
    "w4a16-auto-round-g128": Peer("auto-round", AUTO_ROUND, 128, AUTO_ROUND_OPTIONS),
    "w4a16-auto-round-light-g32": Peer("auto-round", AUTO_ROUND, 32, AUTO_ROUND_LIGHT),
    "w4a16-gptqmodel-g32": Peer("gptqmodel", GPTQMODEL, 32),
    "w4a16-gptqmodel-g128": Peer("gptqmodel", GPTQMODEL, 128),
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
    # Ablations: each leaves out or changes one component of `served-effort-fast`. Learning after them would take time,
    # and could make up for the component.
    "served-no-mask": Served(recipe={**FAST, "escape_budget": 0.0}),
    "served-budget-0.5": Served(recipe={**FAST, "escape_budget": 0.005}),
    "served-budget-1": Served(recipe={**FAST, "escape_budget": 0.01}),
    "served-budget-5": Served(recipe={**FAST, "escape_budget": 0.05}),
    "served-no-massive-row": Served(recipe={**FAST, "massive_row": False}),
    "served-no-modality-rows": Served(recipe={**FAST, "modality_rows": False}),
    "served-budget-0.5-no-modality-rows": Served(recipe={**FAST, "escape_budget": 0.005, "modality_rows": False}),
    "served-no-mask-no-modality-rows": Served(recipe={**FAST, "escape_budget": 0.0, "modality_rows": False}),
    "served-no-regression": Served(recipe={**FAST, "regression": False}),
    "served-nearest": Served(recipe={**FAST, "regression": False, "rounding": "nearest"}),
    # Nothing learns after the blocks; or more does, and held-out samples choose the regression and the rounding.
    "served-effort-fast": Served(recipe=FAST),
    "served-effort-best": Served(recipe={"effort": "best"}),
    # Fewer drawn tokens; --calibration gives more windows than that.
    "served-tokens-16k": Served(recipe={"sample_tokens": FAST_SAMPLE_TOKENS}),
    # The paper's objective: the reference's mask and range search instead of the budgeted one, and its parts. These
    # stand beside `served-effort-fast`, too.
    "served-reference-grid": Served(recipe={**FAST, "grid": "reference"}),
    "served-composite": Served(recipe={**FAST, "grid": "reference", "cosine_weight": COSINE_WEIGHT}),
    "served-network-mask": Served(recipe={**FAST, "grid": "reference"}, network_tau=TAU),
    "served-composite-network-mask": Served(
        recipe={**FAST, "grid": "reference", "cosine_weight": COSINE_WEIGHT}, network_tau=TAU
    ),
    "served-reference-no-mask": Served(recipe={**FAST, "grid": "reference", "tau": NO_MASK_TAU, "full_mask": []}),
    "served-no-search": Served(recipe={**FAST, "grid": "reference", "lower": 0.999}),
    "served-g64": Served(recipe={"group_size": 64}),
    # Mixed precision: the few inputs that pay most get 8-bit weights or stay in 16 bit.
    "served-bits-4.6": Served(recipe={"bits_budget": 4.6}),
    "served-bits-5": Served(recipe={"bits_budget": 5.0}),
    # An equal budget of escapes for every input, instead of one price for the model.
    "served-equal-budget": Served(recipe={"budget": "equal"}),
    "served-group": Served(recipe={"scale_levels": 0}),
    "served-group-g64": Served(recipe={"scale_levels": 0, "group_size": 64}),
    # Floors: the loss of one part alone. Scales are two-level as in `served`, or one for each group.
    "floor-weights": Simulated("ours", 32, levels=MAX_LEVEL),
    "floor-weights-g64": Simulated("ours", 64, levels=MAX_LEVEL),
    "floor-weights-group": Simulated("ours", 32),
    "floor-weights-group-g64": Simulated("ours", 64),
    "floor-served-weights": Part("weights"),
    "floor-activations": Part("activations"),
    **{f"floor-{kind}": Part(kind) for kind in KINDS},
}

# The rows of the paper's objective.
OBJECTIVE = (
    "served-reference-grid",
    "served-composite",
    "served-network-mask",
    "served-composite-network-mask",
    "served-reference-no-mask",
    "served-no-search",
)

# Rows that leave out one component.
ABLATIONS = (
    "served-no-mask",
    "served-budget-1",
    "served-no-massive-row",
    "served-no-regression",
    "served-nearest",
)

# The models of the table, by their benchmarks. Gemma's package is not a dependency.
TABLE_MODELS = ("language", "small-text", "omni")
# The table over all models: published methods, ours by effort and without a component, in both schemes, the paper's
# objective and the floors.
TABLE = (
    "16bit",
    *(name for name in METHODS if name.startswith("w4a")),
    "oracle-rtn-g64",
    "oracle-nf4",
    "served-16bit",
    "served",
    "served-effort-best",
    "served-effort-fast",
    *ABLATIONS,
    "served-g64",
    "served-group",
    "served-group-g64",
    *OBJECTIVE,
    *(name for name in METHODS if name.startswith("floor-")),
)

# A model of one modality has no modality-specific rows.
OMNI_ONLY = ("served-no-modality-rows", "served-budget-0.5-no-modality-rows", "served-no-mask-no-modality-rows")


# Benchmarks that ask questions about media, of a dense model and of a mixture of experts.
OMNI, MOE_OMNI = "omni", "moe-omni"
ASKING = (OMNI, MOE_OMNI)
# Methods that need no activations of their own of an expert that calibration tokens may not choose.
EXPERTS = (
    "16bit",
    "w4a16-rtn-g64",
    "w4a16-rtn-g32",
    "w4a16-gptq-g64",
    "w4a16-gptq-g32",
    "w4a4-token",
    "w4a4-token-group",
    "served-16bit",
    "served",
    "served-g64",
    "floor-weights",
)


def known_methods(benchmark: str) -> list[str]:
    """Names of the methods that a benchmark has. Peers are asked about text models only."""
    if benchmark == MOE_OMNI:
        return list(EXPERTS)
    if benchmark == OMNI:
        return [name for name, method in METHODS.items() if not isinstance(method, Peer)]
    return [name for name in METHODS if name not in OMNI_ONLY]


def obstacle(method: Method, widths: Mapping[str, int], tools: Container[str]) -> str | None:
    """Why a model cannot have a method; None if it can. `widths`: K by linear; `tools`: peers with an environment."""
    for size in _group_sizes(method):
        for name, width in widths.items():
            # Calibration leaves a linear in 16 bit if no group size of the format divides its K.
            spared = isinstance(method, Part | Served) and all(width % known for known in GROUP_SIZES)
            if width % size and not spared:
                return f"K = {width} of {name} is not divisible by group size {size}"
    if isinstance(method, Part) and method.part in KINDS:
        kind = KINDS[method.part]
        if not any(name.endswith(kind) for name in widths):
            return f"the model has none of the linears {', '.join(kind)}"
    if isinstance(method, Peer) and method.tool not in tools:
        return f"give --peer {method.tool}=PYTHON, the python of an environment with it"
    return None


def _group_sizes(method: Method) -> list[int]:
    """Sizes of groups that must divide the K of each linear."""
    if isinstance(method, Peer):
        return [method.group_size]
    if isinstance(method, Simulated):
        weights = [method.group_size] if method.weights in ("rtn", *SEQUENTIAL) else []
        return weights + ([method.activation_group] if method.activations == "token-group" else [])
    if isinstance(method, Served) and not method.quantized:
        return []
    return [read_recipe(overrides=method.recipe).group_size]


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
