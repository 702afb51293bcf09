"""The four benchmarks of the paper's table: their folders below --data, and the questions that are asked.

Layouts, prompts and rules are cited where they are read, in `benchmarks/common/questions/datasets/`. Numbers of
questions are those of the published data set cards: ScienceQA 4241 in test, 2017 of them with an image
(derek-thomas/ScienceQA; lmms-lab/ScienceQA, configuration ScienceQA-IMG), MMMU 900 in validation, Video-MME 2700.
AIR-Bench's card states none; fixie-ai/ultravox counts 24683 (`num_samples` in its data configuration).

The paper does not say which questions its figures are of. Those of ScienceQA, MMMU and Video-MME can be shares of 4241,
900 and 2700 questions. They cannot be shares of the 2017 with an image, or of MMMU's 847 with choices: tests/ has the
arithmetic. So its figures fit all questions of these, and not those parts. For AIR-Bench the settings in a public copy
of its code name Foundation (KanghoonYoon/morphoquant_hif4, MorphoQuant-static_1.1/configs/qwen2.5-omni-3b/morpho,
commit 3955de6). Q-VLM's evaluation, as LLaVA's, reports ScienceQA's whole split first and the questions with an image
beside it (ChangyuanWang17/QVLM, llava/eval/eval_science_qa.py, commit 4faa7f7).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from benchmarks.common.questions.datasets import air_bench, mmmu, scienceqa, video_mme
from benchmarks.common.questions.items import Item, Media
from benchmarks.paper.prompts import PAPER, prompted

ALL, IMAGE = "all", "image"


@dataclass(frozen=True)
class Benchmark:
    """One column of the table."""

    name: str
    # The module that reads, prompts and scores it.
    reader: ModuleType
    # Its folder below --data, and its repository on Hugging Face.
    folder: str
    repository: str
    # Number of questions, as published or counted.
    questions: int
    # Tokens of a prompt with its media: a guess, for the estimate of time only.
    tokens: int
    # Most requests at a time, since a video is in memory several times while it is sent.
    concurrency: int | None = None

    def directory(self, data: Path) -> Path:
        """Its local copy."""
        return data / self.folder


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("scienceqa", scienceqa, "ScienceQA", "derek-thomas/ScienceQA", 4241, 500),
        Benchmark("mmmu", mmmu, "MMMU", "MMMU/MMMU", 900, 1500),
        Benchmark("video-mme", video_mme, "Video-MME", "lmms-lab/Video-MME", 2700, 12000, concurrency=2),
        Benchmark("air-bench", air_bench, "AIR-Bench-Dataset", "qyang1021/AIR-Bench-Dataset", 24683, 500),
    )
}


def media_name(item: Item) -> str:
    """Name of a question's first media file below its data set; empty if it has no file."""
    for part in item.parts:
        if isinstance(part, Media) and not isinstance(part.source, bytes):
            # Names of sounds repeat from folder to folder.
            place = PurePath(str(part.source))
            return f"{place.parent.name}/{place.name}"
    return ""


def asked(benchmark: Benchmark, data: Path, options: Any, held_out: Collection[str] = ()) -> Iterator[Item]:
    """Questions of a benchmark's local copy, but those about the media that calibration has seen.

    options: `scienceqa` is ALL or IMAGE, `prompts` OWN or PAPER. Raises MorphoQuantError for another layout.
    """
    for item in benchmark.reader.load(benchmark.directory(data), benchmark.reader.SPLIT):
        if benchmark.name == "scienceqa" and options.scienceqa == IMAGE and "image" not in item.groups["modality"]:
            continue
        if held_out and media_name(item) in held_out:
            continue
        yield prompted(item, benchmark.name) if options.prompts == PAPER else item


def spread(found: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of a sequence, evenly spaced."""
    count = min(count, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def hold_out(items: Iterable[Item], count: int, fits: Callable[[Item], bool]) -> list[Item]:
    """Questions that fit about `count` different files of media, evenly spaced; of half of all files at most."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(media_name(item), item)
    return spread([item for item in first.values() if fits(item)], min(count, len(first) // 2))
