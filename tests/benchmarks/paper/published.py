"""The four benchmarks in one folder, under the names that --data wants, with the splits that calibration takes."""

from pathlib import Path

from benchmarks.paper.options import parse
from tests.benchmarks.common.questions.miniature import write_air_bench, write_mmmu, write_scienceqa, write_video_mme


def write_published(directory: Path) -> Path:
    """Miniatures: 4 questions of ScienceQA, 3 of each other benchmark; return the folder."""
    for split in ("train", "test"):
        write_scienceqa(directory / "ScienceQA", split)
    for split in ("dev", "validation"):
        write_mmmu(directory / "MMMU", split)
    write_video_mme(directory / "Video-MME")
    write_air_bench(directory / "AIR-Bench-Dataset")
    return directory


def options(directory: Path, *more: str):  # type: ignore[no-untyped-def]
    """Options for a model, data and output below a directory."""
    places = {"model": directory / "model", "data": directory / "data", "output": directory / "out"}
    return parse([word for name, place in places.items() for word in (f"--{name}", str(place))] + list(more), None)
