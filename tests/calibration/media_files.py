"""Encoded images, audio and video of known content, for the tests of this folder."""

import io
import struct

import av
import numpy as np
from PIL import Image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sine(seconds: float, rate: int, hertz: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def encode_audio(channels: list[np.ndarray], rate: int, container: str, codec: str) -> bytes:
    """Float samples per channel, in [-1, 1], encoded with PyAV as 16-bit."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        layout = "mono" if len(channels) == 1 else "stereo"
        stream = output.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        interleaved = (32767 * np.stack(channels, axis=1)).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
        frame.sample_rate = rate
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def encode_video(frames: int, rate: int, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    """Grey frames of 64 x 32 whose level is 8 times the frame number."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(frames):
            pixels = np.full((32, 64, 3), 8 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def turned_video(quarters: int) -> bytes:
    """Four frames of 64 x 32, white in its upper left quarter, that a player turns clockwise by quarters of a turn."""
    buffer = io.BytesIO()
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    data = bytearray(buffer.getvalue())
    # The matrix of the track's header (version 0), in 16.16 and 2.30 fixed point. PyAV does not write one.
    start = data.index(b"tkhd") + 44
    cosine, sine_ = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    matrix = (cosine << 16, sine_ << 16, 0, -sine_ << 16, cosine << 16, 0, 0, 0, 1 << 30)
    data[start : start + 36] = struct.pack(">9i", *matrix)
    return bytes(data)
