"""Runs one mutant through everything that reads a checkpoint without an engine; its outcome."""

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration.output.inspection import inspect_data, inspect_table
from calibration.output.page import render
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format import verify
from tests.fuzz.judge import Judge
from tests.fuzz.mutants import Mutant, make_mutant

LONGEST_LINE = 700
# The page takes a tenth of a second, its pictures take seconds. The page is made of one mutant in so many, and of each
# mutant of the files that only it and `inspect` read; of these one in so many is drawn.
PAGES = 20
DRAWN = 16
BESIDE = ("morphoquant_calibration.json", "morphoquant_calibration/distributions.safetensors")
GOOD = ("refused", "harmless", "resealed: finite")


@dataclass(frozen=True)
class Finding:
    """A mutant and its outcome: one of GOOD, or a fault with its description."""

    number: int
    file: str
    kind: str
    steps: tuple[str, ...]
    resealed: bool
    outcome: str
    detail: str

    @property
    def good(self) -> bool:
        return self.outcome in GOOD

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(intact: Path, directory: Path, judge: Judge, seed: int, number: int) -> Finding:
    """Make the mutant in `directory` and try it."""
    mutant = make_mutant(intact, directory, seed, number)
    outcome, detail = _try(directory, judge, mutant)
    return Finding(number, mutant.file, mutant.kind, mutant.steps, mutant.resealed, outcome, detail)


def _try(directory: Path, judge: Judge, mutant: Mutant) -> tuple[str, str]:
    refusals = []
    paged = mutant.file in BESIDE or mutant.number % PAGES == 0
    drawn = mutant.file in BESIDE and mutant.number % DRAWN == 0
    readers: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify.verify_checkpoint(directory),
        "inspect": lambda: _inspect(directory, as_json=paged),
    }
    if paged:
        readers["report"] = lambda: _report(directory, drawn=drawn)
    for name, reader in readers.items():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                reader()
        except MorphoQuantError as error:
            line = str(error)
            if not _is_one_line(line):
                return f"{name}: no line", ascii(line)
            refusals.append(f"{name}: {line}")
        # Any escaping error is a fault, including AssertionError, MemoryError and SystemExit.
        except BaseException as error:
            return f"{name}: {type(error).__name__}", "".join(traceback.format_exception(error)[-6:])
    if refusals and refusals[0].startswith("verify"):
        return "refused", refusals[0]
    fault = judge.fault(directory, resealed=mutant.resealed)
    if fault is not None:
        return "accepted and wrong", fault
    return "resealed: finite" if mutant.resealed else "harmless", "; ".join(refusals)


def _is_one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < LONGEST_LINE


def _inspect(directory: Path, *, as_json: bool) -> None:
    """`morphoquant inspect`, with --json too or not."""
    shown = io.StringIO()
    if as_json:
        json.dumps(inspect_data(directory))
    Console(file=shown, width=100).print(inspect_table(directory))
    assert all(_is_one_line(line) for line in shown.getvalue().splitlines() if line), "the table is not printable"


def _report(directory: Path, *, drawn: bool) -> None:
    with contextlib.nullcontext() if drawn else _without_pictures():
        page = directory / "page.html"
        render.write_report(directory, page)
        text = page.read_text(encoding="utf-8")
        page.unlink()
    assert "<script" not in text, "the page runs what a file holds"


@contextlib.contextmanager
def _without_pictures() -> Iterator[None]:
    drawn = render.draw

    def names(content: Any) -> dict[str, bytes]:
        numbers = range(1, len(content.chosen) + 1)
        each = [f"{name}-{number}" for number in numbers for name in ("channels", "codes")]
        return dict.fromkeys(("sizes", "losses", "dispersion", *each), b"")

    render.draw = names
    try:
        yield
    finally:
        render.draw = drawn


def show(finding: Finding) -> str:
    """A finding for people."""
    steps = "".join(f"\n    {step}" for step in finding.steps)
    resealed = "\n    resealed" if finding.resealed else ""
    return f"{finding.number} ({finding.outcome}){steps}{resealed}\n    -> {finding.detail.strip()}"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
