"""Reads the report file: its fields have these types, or the file is refused with the name of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE, read_json

# Values beyond these limits are not measurements. Shares are sums, which round.
_LARGEST_SHARE = 1 + 1e-6
_LARGEST_COUNT = 2**63
_LARGEST_ERROR = 3e38
# As the checkpoint's own names.
_NAME = r"^[\w.\-]{1,200}$"

Share = Annotated[float, Field(ge=0, le=_LARGEST_SHARE, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, le=_LARGEST_ERROR, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
Name = Annotated[str, Field(pattern=_NAME)]


class _Part(BaseModel):
    # Fields of later versions are ignored.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class RowChoice(_Part):
    """Whether a modality has a separate row."""

    own: bool = False


class LayerReport(_Part):
    """Calibration's figures of one layer; the fields of LayerFigures."""

    escape_rate: dict[Name, Share] | None = None
    output_error: Error | None = None
    modality_rows: dict[Name, RowChoice] = {}


class ExpertsReport(_Part):
    """Calibration's figures of one layer's routed experts; the fields of ExpertsFigures."""

    tokens: list[Count] = []
    drawn_tokens: list[Count] = []
    few: Count | None = None
    none: Count | None = None
    input: LayerReport = LayerReport()
    gate_up_error: list[Error | None] = []
    down_error: list[Error | None] = []
    down_escape_rate: list[Share | None] = []


class Data(_Part):
    """The calibration data: samples, and tokens by row."""

    samples: Count | None = None
    tokens: dict[Name, Count] = {}


class Bits(_Part):
    """What `bits_budget` chose: the mean bits of a weight, and the inputs whose linears have wider weights."""

    budget: Annotated[float, Field(gt=0, le=16)]
    mean: Annotated[float, Field(gt=0, le=16)]
    eight_bit: list[Name] = []
    sixteen_bit: list[Name] = []


class Report(_Part):
    """The JSON object of REPORT_FILE."""

    format: Literal[1] = 1
    escape_rate: Share | None = None
    layers: dict[str, LayerReport] = {}
    experts: dict[str, ExpertsReport] = {}
    data: Data = Data()
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    # How an architecture that is not listed was taken; and linears whose K no group size divides.
    architecture: Annotated[str, Field(max_length=200)] | None = None
    sixteen_bit: list[Name] = []
    # Of a run with a bits_budget.
    bits: Bits | None = None


def read_report(directory: Path) -> Report | None:
    """A checkpoint's report; None if it has none. Raises MorphoQuantError naming file and field."""
    path = directory / REPORT_FILE
    if not path.exists() and not path.is_symlink():
        return None
    content = read_json(path)
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise MorphoQuantError(
            f"{path}: {field}: {first['msg']}; copy it from the original checkpoint, or calibrate again"
        ) from error
