"""The settings of a calibration: names, types, defaults, ranges, help; and the YAML recipe that changes them.

Each setting is declared here and nowhere else. `setting_flags` makes the command line of it, `settings_table` the table
in docs/reference/recipe.md. Imports no torch, so that the command line may read it first.
"""

from __future__ import annotations

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
    ValidationInfo,
    field_validator,
)

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES, MAX_LEVEL

Patterns = tuple[str, ...]
if TYPE_CHECKING:
    GroupSize = int
else:
    GroupSize = Literal[GROUP_SIZES]


@dataclass(frozen=True)
class Flag:
    """The flag of a setting that is not called as the setting is."""

    name: str


class Recipe(BaseModel):
    """All settings of `calibrate`. Patterns on HF layer names are fnmatch, or regular expressions after `re:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: Annotated[Patterns | None, Flag("--target")] = Field(
        default=None, description="Linears to quantize; none: every linear of the language model's decoder blocks."
    )
    ignore: Patterns = Field(default=(), description="Linears to leave in 16 bit although a target matches them.")
    towers: Annotated[tuple[Literal["image"], ...], Flag("--tower")] = Field(
        default=(), description="Encoders of media to quantize besides: image (of pictures and video frames)."
    )
    group_size: GroupSize = Field(
        default=GROUP_SIZES[0],
        description=f"Input channels that share one weight scale: one of {', '.join(map(str, GROUP_SIZES))}.",
    )
    tensor_parallel: Literal["auto"] | int = Field(
        default="auto",
        description="Ranks the checkpoint can be split over; auto: the largest of 8, 4, 2, 1 that the model allows.",
    )
    grid: Literal["budget", "reference"] = Field(
        default="budget",
        description="How a channel's step is found: budget (by what the output loses within escape_budget) "
        "or reference (as the authors do: tau, full_mask, lam, lower, lp_norm).",
    )
    escape_budget: float = Field(
        default=0.04,
        ge=0,
        le=0.2,
        description="Part of any modality's codes in a layer that may leave the 4-bit range; 0: none may.",
    )
    massive_row: bool = Field(
        default=True, description="Whether massive tokens (the first of a sequence, as a rule) get a row of their own."
    )
    modality_rows: bool = Field(
        default=True, description="Budget grid: whether modalities get rows of their own where that pays."
    )
    row_margin: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="How much lower a modality's output error on held-back tokens must be for a row of its own.",
    )
    regression: bool = Field(
        default=True, description="Whether weights make up for what rounding activations and the layers before lost."
    )
    shrinkage: float = Field(
        default=0.02, ge=1e-3, le=10, description="How strongly the regression is drawn to the original weights."
    )
    rounding: Literal["compensated", "nearest"] = Field(
        default="compensated",
        description="How weights are rounded: compensated (GPTQ and refinement) or nearest (each by itself).",
    )
    scale_levels: int = Field(
        default=0,
        ge=0,
        le=MAX_LEVEL,
        description="Two-level scales: those of an output channel are whole multiples, 1 to this "
        f"(at most {MAX_LEVEL}), of one number. Needs compensated rounding. 0: every group has a scale of its own.",
    )
    tau: float = Field(
        default=2.0,
        ge=0,
        description="Reference grid: channels this many standard deviations above the mean dispersion may escape.",
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
    max_samples: int = Field(
        default=128, ge=1, description="At most this many conversations and text windows are used."
    )
    max_tokens: int = Field(default=2048, ge=2, description="Longest conversation, in tokens.")
    window_tokens: int = Field(
        default=512, ge=2, description="Length of the windows that .txt files are cut into, in tokens."
    )
    sample_tokens: int = Field(
        default=16384,
        ge=16,
        description="Tokens on which steps and weights are found, shared out over the modalities.",
    )
    modality_balance: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="1: every modality present weighs the same; 0: every token weighs the same. "
        "A modality's share of a weighted mean is proportional to (its number of tokens) ** (1 - balance).",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of sampled tokens.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="In which the model is run: float32, bfloat16 or float16."
    )
    device: str = Field(
        default="auto", description="On which the model is run: auto (cuda where there is one), cpu, cuda, cuda:1..."
    )
    shard_size: ByteSize = Field(default=ByteSize(4_000_000_000), description="Largest weight file, e.g. 4GB.")

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

    @field_validator("scale_levels")
    @classmethod
    def _levels_are_found_by_compensated_rounding(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("rounding") == "nearest":
            raise ValueError("two-level scales need rounding: compensated")
        return value

    @property
    def scale_scheme(self) -> str:
        """How the checkpoint stores the scales of weights."""
        # Not at the top: it imports torch.
        from morphoquant_vllm.format.schema import GROUP_SCHEME, TWO_LEVEL_SCHEME

        return TWO_LEVEL_SCHEME if self.scale_levels else GROUP_SCHEME

    @field_validator("shard_size")
    @classmethod
    def _not_empty(cls, value: ByteSize) -> ByteSize:
        if value < 1:
            raise ValueError("must be at least 1 byte")
        return value


def read_recipe(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file, changed by `overrides` (a value of None overrides nothing).

    Raises MorphoQuantError naming the file and the setting where the file cannot be read, is no mapping, names an
    unknown setting, or where a value is out of range.
    """
    settings = _read_yaml(Path(path)) if path is not None else {}
    settings |= {key: value for key, value in (overrides or {}).items() if value is not None}
    where = str(path) if path is not None else "settings"
    unknown = [str(key) for key in settings if key not in Recipe.model_fields]
    if unknown:
        raise MorphoQuantError(
            f"{where}: unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(Recipe.model_fields)}"
        )
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise MorphoQuantError(f"{where}: {name} = {settings.get(name)!r} is not allowed: {first['msg']}") from error


def read_size(name: str, text: str) -> int:
    """Bytes of a size such as 6GiB; MorphoQuantError naming `name` where it is none."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise MorphoQuantError(f"{name} = {text!r} is no size; write it as 6GiB or 500MB") from error
    if size < 1:
        raise MorphoQuantError(f"{name} = {text!r} must be at least 1 byte")
    return int(size)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MorphoQuantError(f"{path}: no readable recipe ({error.strerror}); give an existing file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise MorphoQuantError(f"{path}: the recipe is not YAML ({reason})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MorphoQuantError(f"{path}: the recipe is no mapping; write one 'setting: value' per line")
    return content
