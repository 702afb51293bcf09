"""Subtitles of a video at the frames that a model sees."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from benchmarks.common.questions.items import wrong_layout

# Published subtitles stand in <font> tags.
_TAG = re.compile(r"<[^>]*>")


def subtitles_of(place: Path, video: Path | zipfile.Path, frames: int, benchmark: str) -> list[str]:
    """Texts of an SRT file in their order, without tags: all for `frames` 0, else those shown at `frames` frames.

    The frames are evenly spaced from the video's first to its last, and each text appears once (lmms-eval 0.7.3,
    tasks/videomme/utils.py). Raises MorphoQuantError if one of the files cannot be read.
    """
    import av

    lines: list[tuple[float, float, str]] = []
    opened: Path | zipfile.Path = place
    try:
        with av.open(str(place)) as container:
            stream = container.streams.subtitles[0]
            for packet in container.demux(stream):
                if packet.pts is not None and packet.time_base is not None:
                    start = float(packet.pts * packet.time_base)
                    text = " ".join(_TAG.sub("", bytes(packet).decode("utf-8", "replace")).split())
                    lines.append((start, start + float((packet.duration or 0) * packet.time_base), text))
        if frames == 0:
            return [text for _, _, text in lines if text]
        opened = video
        with av.open(str(video) if isinstance(video, Path) else video.open("rb"), "r") as container:
            seconds = (container.duration or 0) / 1_000_000  # av.time_base
    except (av.FFmpegError, IndexError) as error:
        raise wrong_layout(
            Path(str(opened)), benchmark, "subtitles and a video that can be read", str(error)
        ) from error
    times = [seconds * number / max(frames - 1, 1) for number in range(frames)]
    return [text for start, end, text in lines if text and any(start <= time < end for time in times)]
