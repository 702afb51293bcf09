"""The settings of a run, and the directories that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.methods import choose
from benchmarks.common.texts import CALIBRATION
from morphoquant_vllm.errors import MorphoQuantError

# Raise when scoring changes what a stored result would be: older results are then left alone and made again.
EVALUATOR_VERSION = 1
# Windows per domain; together 32: as many tokens as calibration looks at by default.
CALIBRATION_WINDOWS = {"python-topics": 6, "report": 6, "poetry": 6, "numpy": 6, "stdlib": 6, "licence": 2}


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose; what a result depends on goes into its cache key."""

    work: Path = Path(".cache/accuracy")
    results: Path = Path("benchmarks/results/accuracy")
    # Hugging Face directory of the language model; None: SmolLM2-135M-Instruct, written into `work`.
    model: Path | None = None
    seed: int = 0
    windows: int = 8
    window_tokens: int = 512
    calibration: Mapping[str, int] = field(default_factory=lambda: dict(CALIBRATION_WINDOWS))
    # In which vLLM serves. float32 by default: bfloat16 is much slower on CPUs that have no instructions for it.
    dtype: str = "float32"
    # Where benchmarks.models.tiny_omni keeps its model and media.
    omni_work: Path = Path(".cache/omni")
    # Questions per kind and batch size of the omni benchmark.
    questions: int = 300
    batch_size: int = 64

    def check(self) -> None:
        """Raise MorphoQuantError naming a setting that leaves nothing to measure."""
        for name, least in (("windows", 1), ("window_tokens", 2), ("questions", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise MorphoQuantError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def parse_calibration(text: str) -> dict[str, int]:
    """Windows per domain from "domain=12,domain=4"; MorphoQuantError naming what is wrong."""
    counts = {}
    for part in text.split(","):
        domain, _, number = part.partition("=")
        choose("calibration domain", [domain], CALIBRATION)
        if not number.isdecimal():
            raise MorphoQuantError(f"--calibration: '{part}' is not domain=windows, for example {domain}=12")
        counts[domain] = int(number)
    if not any(counts.values()):
        raise MorphoQuantError("--calibration: no window is left to calibrate on")
    return counts
