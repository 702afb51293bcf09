"""Handwritten digits (scikit-learn's) as small pictures and as short clips."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The processor enlarges pictures and clips four times. So a cell, which holds one digit, is one token in both.
CELL = 28
PICTURE_CELLS, CLIP_CELLS = (2, 2), (2, 4)
# vLLM and transformers sample Qwen's videos at two frames a second, and a temporal patch is two frames. At this rate
# every frame is used, and each of a clip's two digits fills one temporal patch.
FRAMES_PER_SECOND = 2
FRAMES_PER_DIGIT = 2


@cache
def handwritten() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pictures [1797, 8, 8] in 0..1 and their digits [1797], in an order that is the same everywhere."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return bunch.images[order] / 16, bunch.target[order].astype(np.int64)


def cell(picture: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.uint8]:
    """One 8 x 8 digit as it was written again: [CELL, CELL], turned, moved, scaled, with noise and other contrast."""
    scale = 8 / CELL / generator.uniform(0.85, 1.05)
    angle = np.deg2rad(generator.uniform(-10, 10))
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    shift = generator.uniform(-2, 2, 2) - CELL / 2
    # PIL maps each output pixel back to the input: rotate and scale about the centre of both.
    affine = (
        cosine, sine, 4 + cosine * shift[0] + sine * shift[1],
        -sine, cosine, 4 - sine * shift[0] + cosine * shift[1],
    )  # fmt: skip
    source = Image.fromarray((picture * 255).astype(np.float32), mode="F")
    drawn = np.asarray(source.transform((CELL, CELL), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    drawn = drawn * generator.uniform(0.7, 1.0) + generator.normal(0, 8, drawn.shape) + generator.uniform(0, 30)
    return drawn.clip(0, 255).astype(np.uint8)


def _scene(
    drawn: NDArray[np.uint8], cells: tuple[int, int], place: tuple[int, int], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """An RGB image of rows x columns of cells, [rows * CELL, columns * CELL, 3]: noise, and the digit in one cell."""
    scene = generator.normal(generator.uniform(0, 30), 8, (cells[0] * CELL, cells[1] * CELL))
    top, left = CELL * place[0], CELL * place[1]
    scene[top : top + CELL, left : left + CELL] = drawn
    return np.repeat(scene.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _place(cells: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
    return int(generator.integers(cells[0])), int(generator.integers(cells[1]))


def write_picture(path: Path, picture: NDArray[np.float64], generator: np.random.Generator) -> None:
    """Write a PNG of 2 x 2 cells with the digit in one of them."""
    place = _place(PICTURE_CELLS, generator)
    Image.fromarray(_scene(cell(picture, generator), PICTURE_CELLS, place, generator)).save(path)


def write_clip(path: Path, pictures: list[NDArray[np.float64]], generator: np.random.Generator) -> None:
    """Write an MPEG-4 file of 2 x 4 cells in which the digits appear one after another, somewhere, trembling."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = CLIP_CELLS[1] * CELL, CLIP_CELLS[0] * CELL, "yuv420p"
        stream.options = {"qscale": "2", "flags": "+bitexact"}
        stream.codec_context.thread_count = 1
        for picture in pictures:
            place, drawn = _place(CLIP_CELLS, generator), cell(picture, generator)
            for _ in range(FRAMES_PER_DIGIT):
                moved = np.roll(drawn, generator.integers(-1, 2, 2), (0, 1))
                frame = av.VideoFrame.from_ndarray(_scene(moved, CLIP_CELLS, place, generator), format="rgb24")
                for packet in stream.encode(frame):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
