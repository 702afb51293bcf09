"""Calibration data, and the calibration: `python -m calibration` in a separate process.

The paper calibrates on 128 samples and does not say which. A public copy of its code (see `prompts`) makes a
checkpoint for each benchmark. It takes samples of ScienceQA's and MMMU's validation splits, and the first questions of
Video-MME and AIR-Bench, which it asks again. Here one checkpoint serves all. Its samples are questions of ScienceQA's
train split and of MMMU's dev split, with their answers. Video-MME and AIR-Bench publish a test split only. So the
samples also have questions about a few of their videos and sounds, and no row of the table is asked about these. A
video becomes a clip of evenly spaced frames.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.files import digest, write_atomically
from benchmarks.common.questions.ask import content
from benchmarks.common.questions.items import Item, Media
from benchmarks.common.server import until_parent_dies
from benchmarks.paper.prompts import PAPER, prompted
from benchmarks.paper.questions import BENCHMARKS, asked, hold_out, media_name, spread
from morphoquant_vllm.errors import MorphoQuantError

SAMPLES = 128
# The sources of 16 samples.
SHARES = {"scienceqa": 6, "mmmu": 4, "air-bench": 4, "video-mme": 2}
TRAINING_SPLITS = {"scienceqa": "train", "mmmu": "dev"}
# Limits of a sample's media, which keep it below MAX_TOKENS. A token is 28 x 28 pixels, or 40 ms of sound.
PIXELS = 1_500_000
SOUND_SECONDS = 40.0
MAX_TOKENS = 4096
# Arguments for the samples of this module. Some published sounds are broken, hence --skip-bad.
ARGUMENTS = ("--skip-bad", "--max-tokens", str(MAX_TOKENS))
# A clip: frames, frames per second, longest side in pixels.
FRAMES, RATE, SIDE = 16, 2, 448
DATA_FILE, SOURCES_FILE, SECONDS_FILE, LOG_FILE = (
    "calibration.jsonl",
    "calibration.json",
    "calibration_seconds.json",
    "calibration.log",
)
CHECKPOINT = "checkpoint"
TICK_SECONDS = 5


def prepare(data: Path, output: Path, names: Sequence[str], options: Any) -> dict[str, Any]:
    """Write the samples to OUTPUT unless they exist; return their number by source, and the held-out media.

    options: `hold_out`, `scienceqa`, `prompts`, `system`. Raises MorphoQuantError if a data set is not as published, or
    gives no sample.
    """
    place = output / SOURCES_FILE
    if place.is_file():
        known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        added = [name for name in names if name not in known["benchmarks"]]
        if added:
            raise MorphoQuantError(
                f"{output}: its samples were taken before {', '.join(added)} was asked for; choose another --output"
            )
        return known
    chosen: dict[str, list[Item]] = {}
    for name in names:
        count = SAMPLES * SHARES[name] // sum(SHARES.values())
        if name in TRAINING_SPLITS or options.hold_out:
            chosen[name] = samples(name, data, count, options)
    held_out = {name: sorted(map(media_name, found)) for name, found in chosen.items() if name not in TRAINING_SPLITS}
    items = [item for found in chosen.values() for item in found]
    if not items:
        raise MorphoQuantError(f"{data}: no calibration sample in it; give some with --calibration-data")
    lines = [json.dumps({"messages": messages(item, options.system)}) + "\n" for item in items]
    write_atomically(output / DATA_FILE, "".join(lines))
    sources = {
        "benchmarks": list(names),
        "samples": {name: len(found) for name, found in chosen.items()},
        "held_out": held_out,
        "sha256": digest(lines),
    }
    # Written last: if it exists, the samples are complete.
    write_atomically(place, json.dumps(sources, indent=1) + "\n")
    return sources


def samples(name: str, data: Path, count: int, options: Any) -> list[Item]:
    """Questions to calibrate on: from the split that is published for it, or the few that are held out."""
    benchmark = BENCHMARKS[name]
    if name in TRAINING_SPLITS:
        found = benchmark.reader.load(benchmark.directory(data), TRAINING_SPLITS[name])
        own = spread([item for item in found if fits(item)], count)
        return [prompted(item, name) for item in own] if options.prompts == PAPER else own
    return hold_out(asked(benchmark, data, options), count, fits)


def fits(item: Item) -> bool:
    """Whether a question's media exist and are small enough for a sample; only short videos are."""
    from PIL import Image

    pixels = 0
    for part in item.parts:
        if isinstance(part, str):
            continue
        if not isinstance(part.source, bytes) and not part.source.is_file():
            return False
        if part.kind == "image":
            with Image.open(io.BytesIO(part.read())) as image:
                pixels += image.width * image.height
        elif part.kind == "audio" and not 0 < sound_seconds(part) <= SOUND_SECONDS:
            return False
    return pixels <= PIXELS and item.groups.get("duration", "short") == "short"


def sound_seconds(sound: Media) -> float:
    """Length of a sound, of which the header is read; 0 if its file is broken, as some are, or does not say."""
    import av

    # All sounds of AIR-Bench together have tens of GB.
    source = str(sound.source) if isinstance(sound.source, Path) else io.BytesIO(sound.read())
    try:
        with av.open(source, "r") as container:
            return (container.duration or 0) / av.time_base
    except av.FFmpegError:
        return 0.0


def messages(item: Item, system: str = "") -> list[dict[str, Any]]:
    """A question as it is asked, with clips for videos, and its answer; `system` is the system prompt, if any."""
    parts = tuple(
        Media("video", "mp4", clip(part.read())) if isinstance(part, Media) and part.kind == "video" else part
        for part in item.parts
    )
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": content(replace(item, parts=parts))},
        {"role": "assistant", "content": item.answers[0]},
    ]


def clip(video: bytes) -> bytes:
    """MPEG-4 of FRAMES evenly spaced frames of a video; MorphoQuantError if it cannot be decoded."""
    import av
    import numpy as np

    from calibration.data.media import upright_frame

    try:
        with av.open(io.BytesIO(video), "r") as container:
            count = sum(1 for _ in container.decode(video=0))
        wanted = set(spread(range(count), FRAMES))
        with av.open(io.BytesIO(video), "r") as container:
            frames = [frame for number, frame in enumerate(container.decode(video=0)) if number in wanted]
        made = io.BytesIO()
        images = [np.ascontiguousarray(upright_frame(frame, frame.to_ndarray(format="rgb24"))) for frame in frames]
        height, width, _ = images[0].shape
        scale = min(1.0, SIDE / max(width, height))
        with av.open(made, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            # Codecs take even sizes.
            stream.width, stream.height = (int(side * scale) // 2 * 2 for side in (width, height))
            stream.pix_fmt = "yuv420p"
            for image in images:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(stream.encode(frame.reformat(width=stream.width, height=stream.height)))
            container.mux(stream.encode())
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise MorphoQuantError(f"a video to calibrate on cannot be decoded ({error}); pass --no-hold-out") from error
    return made.getvalue()


def is_calibrated(output: Path) -> bool:
    """Whether the checkpoint is in its place, which it is only as a whole."""
    return (output / CHECKPOINT / "config.json").is_file()


def calibrate(model: Path, data: Sequence[Path], output: Path, arguments: Sequence[str]) -> float:
    """Make OUTPUT/checkpoint unless it exists, or continue an earlier run; return the seconds that it took.

    Raises MorphoQuantError with calibration's last line if it fails. Time that passed between two runs is not counted.
    """
    place, log = output / SECONDS_FILE, output / LOG_FILE
    seconds = float(json.loads(place.read_text())) if place.is_file() else 0.0
    if is_calibrated(output):
        return seconds
    line = [*until_parent_dies(), sys.executable, "-m", "calibration", "calibrate", str(model)]
    line += [word for path in data for word in ("--data", str(path))]
    line += ["--output", str(output / CHECKPOINT), *arguments]
    started = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(TICK_SECONDS)
                # Written again and again, so the time of a killed run counts, too.
                write_atomically(place, json.dumps(seconds + time.monotonic() - started))
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        last = next(reversed(log.read_text(errors="replace").strip().splitlines()), "no message")
        raise MorphoQuantError(f"calibration failed: {last.removeprefix('error: ')}; its log is {log}")
    return seconds + time.monotonic() - started
