"""The settings of a calibration: names, types, defaults, ranges, help. Reads the YAML recipe that changes them.

Each setting is declared only here. `flags.with_setting_flags` makes the command line from it, `table.settings_table`
the table in docs/reference/recipe.md. Does not import torch: the command line reads this module first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES, MAX_LEVEL

Patterns = tuple[str, ...]
# The default of `sample_tokens`: all tokens of 128 windows of 512, and fewer with `effort: fast`.
SAMPLE_TOKENS, FAST_SAMPLE_TOKENS = 2**16, 2**14
if TYPE_CHECKING:
    GroupSize = int
else:
    GroupSize = Literal[GROUP_SIZES]


@dataclass(frozen=True)
class Flag:
    """The flag of a setting whose name differs from the setting's."""

    name: str


class Recipe(BaseModel):
    """All settings of `calibrate`. Patterns of HF layer names are fnmatch, or regular expressions after `re:`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    targets: Annotated[Patterns | None, Flag("--target")] = Field(
        default=None, description="Linears to quantize; none: every linear of the language model's decoder blocks."
    )
    ignore: Patterns = Field(default=(), description="Linears to leave in 16 bit although a target matches them.")
    towers: Annotated[tuple[Literal["image"], ...], Flag("--tower")] = Field(
        default=(), description="Encoders of media to quantize as well: image (for pictures and video frames)."
    )
    decoder: str = Field(
        default="",
        description="Module with the list of decoder blocks, as transformers names it; empty: found by itself. "
        "It leads to the generic path.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run the code that the model's directory brings (auto_map of config.json), which may do anything.",
    )
    group_size: GroupSize = Field(
        default=GROUP_SIZES[0],
        description=f"Input channels that share one weight scale: one of {', '.join(map(str, GROUP_SIZES))}.",
    )
    tensor_parallel: Literal["auto"] | int = Field(
        default="auto",
        description="Ranks that can share the checkpoint; auto: the largest of 8, 4, 2, 1 that the model allows.",
    )
    grid: Literal["budget", "reference"] = Field(
        default="budget",
        description="Search of a channel's step: budget (smallest output error within escape_budget) "
        "or reference (as the authors do: tau, full_mask, lam, lower, lp_norm, cosine_weight).",
    )
    escape_budget: float = Field(
        default=0.04,
        ge=0,
        le=0.2,
        description="Fraction of a modality's codes in a layer that may leave the 4-bit range; 0: none may.",
    )
    budget: Literal["auto", "equal", "model"] = Field(
        default="auto",
        description="Budget grid: equal (every input has escape_budget) or model (inputs whose escapes save most in "
        "the model's output have more, others less; the mean over channels is escape_budget). auto: model if steps and "
        "scales learn, as effort says, else equal.",
    )
    massive_row: bool = Field(
        default=True, description="Whether massive tokens (usually the first of a sequence) get a separate row."
    )
    modality_rows: bool = Field(
        default=True, description="Budget grid: whether a modality gets a separate row if that lowers its error enough."
    )
    row_margin: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Relative reduction of a modality's error on held-out tokens that a separate row must reach.",
    )
    effort: Literal["fast", "default", "best"] = Field(
        default="default",
        description="fast: all calibration samples fit the weights. default: then steps, output scales and constants "
        "learn from the 16-bit model's next tokens; one of 8 samples is held out of fits, and judges. best: it "
        "learns three times as long.",
    )
    regression: bool = Field(
        default=True, description="Whether weights compensate for the errors of rounded activations and earlier layers."
    )
    shrinkage: float = Field(
        default=16.0,
        ge=1e-3,
        le=1e3,
        description="Strength of the regression's pull towards the original weights, which also grows with a layer's "
        "channels and falls with the tokens.",
    )
    rounding: Literal["compensated", "nearest"] = Field(
        default="compensated",
        description="Rounding of weights: compensated (GPTQ and refinement) or nearest (each weight separately).",
    )
    bits_budget: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Mean bits of a weight, with its share of the scales, that the decoder's linears may take. The few "
        "inputs whose linears pay most for it get 8-bit weights, or stay in 16 bit; null: all have 4-bit weights.",
    )
    scale_levels: int = Field(
        default=MAX_LEVEL,
        ge=0,
        le=MAX_LEVEL,
        description="Two-level scales: a group's scale is an integer from 1 to this "
        f"(at most {MAX_LEVEL}), times the scale of its output channel. 0: group scales.",
    )
    tau: float = Field(
        default=2.0,
        ge=0,
        description="Reference grid: channels this many standard deviations above the mean dispersion may escape.",
    )
    dispersion_threshold: float | None = Field(
        default=None,
        gt=0,
        description="Reference grid: channels of at least this dispersion may escape, in every layer alike; "
        "null: those that tau picks in each layer.",
    )
    full_mask: Patterns = Field(
        default=("*.down_proj",), description="Reference grid: linears in which every channel may escape."
    )
    lam: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Reference grid: in the range search, masked values beyond lam * range are kept.",
    )
    lower: float = Field(
        default=0.6,
        gt=0,
        lt=1,
        description="Reference grid: smallest of the 15 ratios by which the search shrinks a range.",
    )
    lp_norm: float = Field(
        default=2.0, gt=0, le=8, description="Reference grid: power of the rounding error that the search minimises."
    )
    cosine_weight: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Reference grid: weight of the cosine between values and rounded values in the range search, "
        "beside their error; 0.75 is the paper's composite loss.",
    )
    max_samples: int = Field(
        default=128, ge=1, description="At most this many conversations and text windows are used."
    )
    max_tokens: int = Field(
        default=32768,
        ge=2,
        description="Longest conversation, in tokens: longer text is cut, longer media are refused. "
        "A phone's photo takes up to 16,384, a minute of sound 1,500.",
    )
    window_tokens: int = Field(
        default=512, ge=2, description="Length of the windows that .txt files are cut into, in tokens."
    )
    sample_tokens: int = Field(
        default=SAMPLE_TOKENS,
        ge=16,
        description="Tokens from which steps and weights are computed, divided among the modalities; "
        f"{FAST_SAMPLE_TOKENS} by default with effort fast.",
    )
    modality_balance: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="1: every modality present has the same weight; 0: every token has the same weight. "
        "A modality's share of a weighted mean is proportional to (its number of tokens) ** (1 - balance).",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the choice of drawn tokens.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Dtype in which the model runs: float32, bfloat16 or float16."
    )
    device: str = Field(
        default="auto", description="Device on which the model runs: auto (cuda if available), cpu, cuda, cuda:1..."
    )
    shard_size: ByteSize = Field(default=ByteSize(4_000_000_000), description="Largest weight file, e.g. 4GB.")

    @model_validator(mode="before")
    @classmethod
    def _fewer_tokens_if_fast(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"sample_tokens": FAST_SAMPLE_TOKENS, **values} if values.get("effort") == "fast" else values

    @field_validator("targets", "ignore", "towers", "full_mask", mode="before")
    @classmethod
    def _one_of_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: Patterns | None) -> Patterns | None:
        if value == ():
            raise ValueError("no pattern; leave it out to quantize every decoder linear")
        return value

    @field_validator("tensor_parallel")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 'auto' or at least 1")
        return value

    @property
    def scale_scheme(self) -> str:
        """The checkpoint's storage scheme of weight scales."""
        # Imported here: it imports torch.
        from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME

        return TWO_LEVEL_SCHEME if self.scale_levels else GROUP_SCHEME

    @field_validator("shard_size")
    @classmethod
    def _not_empty(cls, value: ByteSize) -> ByteSize:
        if value < 1:
            raise ValueError("must be at least 1 byte")
        return value


def shares_budget(recipe: Recipe, *, learns: bool) -> bool:
    """Whether inputs share a budget of the model, of bits or of escapes; `learns`: whether steps and scales learn."""
    return recipe.bits_budget is not None or shares_escapes(recipe, learns=learns)


def shares_escapes(recipe: Recipe, *, learns: bool) -> bool:
    """Whether inputs share one budget of escapes."""
    wanted = recipe.budget == "model" or (recipe.budget == "auto" and learns)
    return wanted and recipe.grid == "budget" and recipe.escape_budget > 0


def rounds_jointly(recipe: Recipe, *, learns: bool) -> bool:
    """Whether rounding lets errors of outputs cancel each other, by metrics that take the head that learning takes."""
    return learns and recipe.rounding == "compensated"


def read_recipe(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file, changed by `overrides` (a value of None overrides nothing).

    Raises MorphoQuantError naming the file and the setting if the file cannot be read or is not a mapping. Unknown
    settings and values out of range raise it too.
    """
    settings = _read_yaml(Path(path)) if path is not None else {}
    settings |= {key: value for key, value in (overrides or {}).items() if value is not None}
    origin = str(path) if path is not None else "settings"
    unknown = [str(key) for key in settings if key not in Recipe.model_fields]
    if unknown:
        raise MorphoQuantError(
            f"{origin}: unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(Recipe.model_fields)}"
        )
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise MorphoQuantError(f"{origin}: {name} = {settings.get(name)!r} is not allowed: {first['msg']}") from error


def read_size(name: str, text: str) -> int:
    """Bytes of a size such as 6GiB; MorphoQuantError naming `name` if `text` is not a size."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise MorphoQuantError(f"{name} = {text!r} is not a size; write it as 6GiB or 500MB") from error
    if size < 1:
        raise MorphoQuantError(f"{name} = {text!r} must be at least 1 byte")
    return int(size)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise MorphoQuantError(
            f"{path}: the recipe cannot be read ({error.strerror}); give an existing file"
        ) from error
    # A date or a number that looks like one and is none is a ValueError; text that is not UTF-8, too.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise MorphoQuantError(f"{path}: the recipe is not YAML ({reason})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MorphoQuantError(f"{path}: the recipe is not a mapping; write one 'setting: value' per line")
    # YAML would take the last one without a word.
    assert node is not None
    counts = Counter(key.value for key, _ in node.value)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise MorphoQuantError(f"{path}: {twice} is set {counts[twice]} times; leave one of the lines")
    return content
