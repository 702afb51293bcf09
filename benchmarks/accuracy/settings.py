"""The settings of a run, and the directories that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.methods import choose
from benchmarks.common.texts import CALIBRATION
from morphoquant_vllm.errors import MorphoQuantError

# Raise this number if a change of scoring would change stored results. They are then made again.
EVALUATOR_VERSION = 1
# Windows per domain; together 32, which are as many tokens as calibration draws by default.
CALIBRATION_WINDOWS = {"python-topics": 6, "report": 6, "poetry": 6, "numpy": 6, "stdlib": 6, "licence": 2}


@dataclass(frozen=True)
class Settings:
    """All choices of a user. Those that change a result are in its cache key."""

    work: Path = Path(".cache/accuracy")
    results: Path = Path("benchmarks/results/accuracy")
    # Hugging Face directory of the language model; None: SmolLM2-135M-Instruct, written into `work`.
    model: Path | None = None
    seed: int = 0
    windows: int = 8
    window_tokens: int = 512
    calibration: Mapping[str, int] = field(default_factory=lambda: dict(CALIBRATION_WINDOWS))
    # The dtype in which vLLM serves. bfloat16 is much slower than float32 on CPUs without instructions for it.
    dtype: str = "float32"
    # Directory in which benchmarks.models.tiny_omni keeps its model and media.
    omni_work: Path = Path(".cache/omni")
    # Questions per kind and batch size of the omni benchmark.
    questions: int = 300
    batch_size: int = 64

    def check(self) -> None:
        """Raise MorphoQuantError with the setting's name if nothing would be measured."""
        for name, least in (("windows", 1), ("window_tokens", 2), ("questions", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise MorphoQuantError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def parse_calibration(text: str) -> dict[str, int]:
    """Windows per domain from "domain=12,domain=4"; MorphoQuantError with the faulty entry."""
    counts = {}
    for part in text.split(","):
        domain, _, number = part.partition("=")
        choose("calibration domain", [domain], CALIBRATION)
        if not number.isdecimal():
            raise MorphoQuantError(f"--calibration: '{part}' is not domain=windows, for example {domain}=12")
        counts[domain] = int(number)
    if not any(counts.values()):
        raise MorphoQuantError("--calibration: all counts of windows are 0; give at least one window")
    return counts
