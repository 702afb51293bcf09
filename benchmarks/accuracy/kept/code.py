"""Which code decides a result: its digest is a part of the result's key. Whole folders, so that little is left out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from benchmarks.common.files import code_digest
from benchmarks.models import decoder
from calibration.work.code_files import code_files

HERE = Path(__file__).parents[1]
REPOSITORY = HERE.parents[1]
PLUGIN = REPOSITORY / "morphoquant_vllm"
# What decides how a checkpoint is served.
SERVING = (PLUGIN,)
# What rounds and evaluates a simulated method: calibration's own rounding is one.
SIMULATION = (
    *(HERE / name for name in ("baselines", "experts", "simulation.py")),
    *(Path(decoder.__file__), PLUGIN / "numerics"),
    *(REPOSITORY / "calibration" / name for name in ("quantize", "data", "model", "settings")),
)
# What finds the threshold of a network's mask.
OBJECTIVE = (
    *(HERE / "serving" / "objective.py", Path(decoder.__file__), PLUGIN / "numerics"),
    *(REPOSITORY / "calibration" / name for name in ("data", "model")),
)
# What loads and evaluates a checkpoint, or a part of one, in this process.
PARTS = (
    *(HERE / name for name in ("parts.py", "experts")),
    *(Path(decoder.__file__), PLUGIN / "hf", PLUGIN / "numerics", PLUGIN / "format"),
)


@cache
def calibration_code() -> tuple[Path, ...]:
    """What decides the bytes of a checkpoint: all that calibration imports."""
    return tuple(code_files(REPOSITORY).values())


@cache
def code_of(paths: tuple[Path, ...]) -> str:
    """The digest of the code below `paths` when it is first asked for: code that was imported does not change after."""
    return code_digest(paths)
