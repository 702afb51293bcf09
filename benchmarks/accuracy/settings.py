"""The settings of a run, and the directories that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.methods import choose
from benchmarks.common import texts
from benchmarks.models.small_text import books
from morphoquant_vllm.errors import MorphoQuantError

# Raise this number if a change of scoring would change stored results. They are then made again.
EVALUATOR_VERSION = 1
# Windows per benchmark and domain; together 32: as many tokens as calibration looks at by default.
CALIBRATION_WINDOWS = {
    "language": texts.CALIBRATION_WINDOWS,
    "small-text": books.CALIBRATION_WINDOWS,
}
CALIBRATION_WINDOWS["gemma"] = CALIBRATION_WINDOWS["language"]
# Each kind of text that is evaluated has a domain of its own.
CALIBRATION_WINDOWS["own-kinds"] = {"plays": 11, "python-topics": 5, "numpy": 5, "stdlib": 11}
# Evaluation windows per text: a small model's cost little.
WINDOWS = {"language": 8, "small-text": 32, "gemma": 8, "own-kinds": 16}


@dataclass(frozen=True)
class Settings:
    """All choices of a user. Those that change a result are in its cache key."""

    work: Path = Path(".cache/accuracy")
    results: Path = Path("benchmarks/results/accuracy")
    # Hugging Face directory of the model; None: the benchmark's own.
    model: Path | None = None
    seed: int = 0
    # Evaluation windows per text; None: those of the benchmark.
    windows: int | None = None
    window_tokens: int = 512
    # Windows per domain; None: those of the benchmark.
    calibration: Mapping[str, int] | None = None
    # In which vLLM serves. float32 by default: bfloat16 is much slower on CPUs that have no instructions for it.
    dtype: str = "float32"
    # Where benchmarks.models.small_text keeps its model and texts, and benchmarks.models.tiny_omni model and media.
    text_work: Path = Path(".cache/small_text")
    omni_work: Path = Path(".cache/omni")
    # The python of the environment of each peer, by tool.
    peers: Mapping[str, Path] = field(default_factory=dict)
    # Questions per kind and batch size of the omni benchmark.
    questions: int = 300
    batch_size: int = 64

    def calibration_of(self, benchmark: str) -> Mapping[str, int]:
        """Calibration windows per domain of a benchmark on texts."""
        return CALIBRATION_WINDOWS[benchmark] if self.calibration is None else self.calibration

    def windows_of(self, benchmark: str) -> int:
        """Evaluation windows per text of a benchmark on texts."""
        return WINDOWS[benchmark] if self.windows is None else self.windows

    def check(self) -> None:
        """Raise MorphoQuantError with the setting's name if nothing would be measured."""
        for name, least in (("windows", 1), ("window_tokens", 2), ("questions", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MorphoQuantError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def parse_calibration(text: str, known: Iterable[str]) -> dict[str, int]:
    """Windows per domain from "domain=12,domain=4"; MorphoQuantError naming what is wrong. `known`: the domains."""
    counts = {}
    for part in text.split(","):
        domain, _, number = part.partition("=")
        choose("calibration domain", [domain], known)
        if not number.isdecimal():
            raise MorphoQuantError(f"--calibration: '{part}' is not domain=windows, for example {domain}=12")
        counts[domain] = int(number)
    if not any(counts.values()):
        raise MorphoQuantError("--calibration: all counts of windows are 0; give at least one window")
    return counts
