"""Escape rates by row, of a server's counts and of its calibration's report. Only `read_report` reads a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE, read_json
from morphoquant_vllm.format.schema import ANY_ROW, MASSIVE_ROW
from morphoquant_vllm.numerics.escape_counts import COLUMNS
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)

# The calibration's name for the rate of all tokens together; row 'any' is compared with it.
ALL_TOKENS = "all"
# A row is judged on this many counted tokens, again and again. It is far off at this multiple of its calibrated rate.
JUDGED_TOKENS = 2000
FAR_ABOVE = 2.0


@dataclass(frozen=True)
class RowCounts:
    """Sums over the counted layers, for the tokens of one row."""

    # Tokens that a layer counted; of the layer that counted most.
    tokens: int = 0
    # Tokens times layers, and those that were massive.
    inputs: int = 0
    massive_inputs: int = 0
    codes: int = 0
    escapes: int = 0

    @property
    def escape_rate(self) -> float:
        return self.escapes / self.codes if self.codes else 0.0

    @property
    def massive_share(self) -> float:
        return self.massive_inputs / self.inputs if self.inputs else 0.0

    def since(self, earlier: RowCounts) -> RowCounts:
        """The counts without those of `earlier`."""
        return RowCounts(**{name: value - asdict(earlier)[name] for name, value in asdict(self).items()})


def counts_by_row(counts: Tensor, channels: Tensor, names: Sequence[str]) -> dict[str, RowCounts]:
    """The rows that occurred, of counts int64 [layers, R, len(COLUMNS)], channels int64 [layers] and R row names.

    Massive tokens count in their modality's row, and again in the row 'massive'.
    """
    columns = dict(zip(COLUMNS, counts.unbind(2), strict=True))
    tokens, massive = columns["tokens"], columns["massive_tokens"]
    found = {
        name: RowCounts(
            tokens=int(tokens[:, row].max()),
            inputs=int(tokens[:, row].sum()),
            massive_inputs=int(massive[:, row].sum()),
            codes=int(tokens[:, row] @ channels),
            escapes=int(columns["escapes"][:, row].sum()),
        )
        for row, name in enumerate(names)
        if name != MASSIVE_ROW
    }
    found[MASSIVE_ROW] = RowCounts(
        tokens=int(massive.sum(1).max()),
        inputs=int(massive.sum()),
        massive_inputs=int(massive.sum()),
        codes=int(massive.sum(1) @ channels),
        escapes=int(columns["massive_escapes"].sum()),
    )
    return {name: row for name, row in found.items() if row.tokens}


def summary(rows: Mapping[str, RowCounts], calibrated: Mapping[str, float]) -> str:
    """The rates of all rows, in one line."""
    parts = []
    for name, row in rows.items():
        known = f", calibrated {calibrated[name]:.2%}" if name in calibrated else ""
        massive = "" if name == MASSIVE_ROW else f", {row.massive_share:.2%} massive"
        parts.append(f"{name} {row.escape_rate:.2%}{known} ({row.tokens} tokens{massive})")
    return "; ".join(parts)


class Drift:
    """Compares the served escape rates with the calibrated ones, each row on JUDGED_TOKENS new tokens at a time."""

    def __init__(self, calibrated: Mapping[str, float]) -> None:
        # A row leaves when it has been warned of.
        self.watched = {name: rate for name, rate in calibrated.items() if name != MASSIVE_ROW and rate > 0}
        self._judged: dict[str, RowCounts] = {}

    def warnings(self, rows: Mapping[str, RowCounts]) -> list[str]:
        """A sentence for each row that is far above its calibrated rate for the first time; `rows` since the start."""
        found = []
        for name in [name for name in self.watched if name in rows]:
            new = rows[name].since(self._judged.get(name, RowCounts()))
            if new.tokens < JUDGED_TOKENS:
                continue
            self._judged[name] = rows[name]
            rate = self.watched[name]
            if new.escape_rate > FAR_ABOVE * rate:
                del self.watched[name]
                found.append(
                    f"{new.escape_rate:.2%} of the codes of {name} tokens escape, {new.escape_rate / rate:.1f} times "
                    f"the calibrated {rate:.2%}, on {new.tokens} counted tokens; if this traffic stays, calibrate "
                    "with samples of it"
                )
        return found


def calibrated_rates(report: Any, layers: Mapping[str, int]) -> dict[str, float]:
    """Escape rates by row in calibration, of inputs given with their K; of the rows that all of them have.

    An input has the name of a layer of the checkpoint, or of a list of experts. A report without them gives none.
    """
    try:
        measured = report["layers"] | {name: found["input"] for name, found in report.get("experts", {}).items()}
        rates = [(dict(measured[name]["escape_rate"]), channels) for name, channels in layers.items()]
        common = set.intersection(*(set(layer) for layer, _ in rates)) if rates else set()
        total = sum(layers.values())
        found = {row: sum(float(layer[row]) * channels for layer, channels in rates) / total for row in common}
    # OverflowError: an integer of JSON may be too large for a float.
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return {}
    if ALL_TOKENS in found:
        found[ANY_ROW] = found.pop(ALL_TOKENS)
    return found


def read_report(model: str, revision: str | None) -> Any:
    """The report of a model's calibration, a JSON object; None, with a line in the log, if it cannot be read."""
    path = Path(model) / REPORT_FILE
    if not Path(model).is_dir():
        cached = try_to_load_from_cache(model, REPORT_FILE, revision=revision)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        return read_json(path)
    except MorphoQuantError as problem:
        logger.warning("MorphoQuant: %s (escape rates are not compared with calibration)", problem)
        return None
