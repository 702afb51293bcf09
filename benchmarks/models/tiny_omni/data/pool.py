"""The media of one split: pictures, sounds and clips of digits, written once and cached."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.files import staged
from benchmarks.models.tiny_omni.data import digits, speech


@dataclass(frozen=True)
class Split:
    """The sources of a split: its share of the 1797 written digits, its voices, and its numbers of media by kind."""

    written: tuple[int, int]
    voices: speech.Voices
    pictures: int
    sounds: int
    clips: int


SPLITS = {
    "train": Split((0, 1100), speech.TRAINING, 3300, 2600, 1000),
    "calibration": Split((1100, 1200), speech.CALIBRATION, 300, 200, 200),
    "test": Split((1200, 1797), speech.TEST, 1200, 1000, 600),
}


@dataclass(frozen=True)
class Pool:
    """Files and the digits in them; a clip has two, in the order in which they appear."""

    pictures: list[tuple[int, Path]]
    sounds: list[tuple[int, Path]]
    clips: list[tuple[tuple[int, int], Path]]


def settings_hash(settings: Any) -> str:
    """Twelve hex digits that change with any of the settings (whatever JSON can hold)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def media_pool(work: Path, name: str) -> Pool:
    """The media of split `name`, written into `work` unless they are there.

    Raises MorphoQuantError if espeak-ng is missing.
    """
    split = SPLITS[name]
    folder = work.resolve() / f"media-{name}-{settings_hash(asdict(split))}"
    if not folder.is_dir():
        speech.require_espeak()
        with staged(folder) as staging:
            _write(staging, split, np.random.default_rng(sum(name.encode())))
    pool = Pool([], [], [])
    # The digits stand in the files' names: 00012-7.png, 00012-37.mp4.
    for path in sorted(folder.iterdir()):
        found = re.fullmatch(r"\d+-(\d)(\d?)", path.stem)
        if found and path.suffix == ".png":
            pool.pictures.append((int(found[1]), path))
        elif found and path.suffix == ".wav":
            pool.sounds.append((int(found[1]), path))
        elif found:
            pool.clips.append(((int(found[1]), int(found[2])), path))
    return pool


def _write(folder: Path, split: Split, generator: np.random.Generator) -> None:
    images, written = (part[slice(*split.written)] for part in digits.handwritten())
    for index in range(split.pictures):
        turn = index % len(images)
        digits.write_picture(folder / f"{index:05}-{written[turn]}.png", images[turn], generator)
    for index in range(split.sounds):
        speech.write_spoken(folder / f"{index:05}-{index % 10}.wav", index % 10, split.voices, generator)
    for index in range(split.clips):
        chosen = generator.choice(len(images), 2, replace=False)
        name = f"{index:05}-{written[chosen[0]]}{written[chosen[1]]}.mp4"
        digits.write_clip(folder / name, [images[i] for i in chosen], generator)
