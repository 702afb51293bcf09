"""Generated calibration data for the tests: conversations in OpenAI chat format with their media files."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

SAMPLING_RATE = 16000


def image(seed: int, width: int = 112, height: int = 84) -> Image.Image:
    """Return an RGB image: two colour ramps under noise."""
    generator = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3))
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = generator.integers(0, 256)
    pixels += generator.normal(0, 20, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sound(seed: int, seconds: float = 1.5) -> np.ndarray:
    """Return float32 mono samples at SAMPLING_RATE: a rising tone under noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    tone = np.sin(2 * np.pi * (200 + 300 * generator.random() + 150 * time) * time)
    return (0.4 * tone + 0.05 * generator.normal(size=time.size)).astype(np.float32)


def image_bytes(seed: int) -> bytes:
    """Return `image` as a PNG file."""
    buffer = io.BytesIO()
    image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def sound_bytes(seed: int, seconds: float = 1.5) -> bytes:
    """Return `sound` as a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(seed, seconds), SAMPLING_RATE, format="WAV")
    return buffer.getvalue()


def image_data_url(seed: int) -> str:
    """Return `image` as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(image_bytes(seed)).decode()


def sound_base64(seed: int, seconds: float = 1.5) -> str:
    """Return `sound` as the base64 text that an input_audio part carries."""
    return base64.b64encode(sound_bytes(seed, seconds)).decode()


def write_video(path: Path, seed: int, frames: int = 8, rate: int = 4) -> None:
    """Write an MPEG-4 file without sound: a bright square that crosses a noisy field, 96 x 64 pixels."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            pixels = generator.integers(0, 90, (64, 96, 3), dtype=np.uint8)
            pixels[20:44, 8 * index : 8 * index + 24] = (230, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _turn(*content: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _part(kind: str, value: str) -> dict[str, Any]:
    return {"type": kind, kind: {"data": value, "format": "wav"} if kind == "input_audio" else {"url": value}}


# Media of the data, beside text.
_KINDS = {
    "omni": {"image", "video", "audio"},
    "vl": {"image", "video"},
    "image": {"image"},
    "audio": {"audio"},
    "text": set(),
}


def write_calibration_data(directory: Path, processor_kind: str = "omni") -> Path:
    """Write data.jsonl and the media it names into `directory`; return the path of data.jsonl.

    processor_kind is a key of _KINDS.
    """
    (directory / "media").mkdir(parents=True, exist_ok=True)
    answer = {"role": "assistant", "content": "The tone rises slowly, and a red square moves over the field."}
    conversations = [
        [{"role": "user", "content": "What can you see below the old town, where the market is held?"}, answer],
        [
            {"role": "system", "content": "You are a helpful assistant."},
            _turn(_text("Describe it was the best of times, it was the worst of times.")),
            answer,
        ],
    ]
    kinds = _KINDS[processor_kind]
    if "image" in kinds:
        (directory / "media" / "ramp.png").write_bytes(image_bytes(1))
        conversations += [
            [_turn(_part("image_url", "media/ramp.png"), _text("What can you see in this image?")), answer],
            [
                _turn(_text("Describe the picture."), _part("image_url", image_data_url(3))),
                answer,
                _turn(_text("And in one short sentence?")),
            ],
        ]
    if "video" in kinds:
        write_video(directory / "media" / "square.mp4", 2)
        conversations.append([_turn(_part("video_url", "media/square.mp4"), _text("The video shows what?")), answer])
    if "audio" in kinds:
        (directory / "media" / "tone.wav").write_bytes(sound_bytes(4))
        pictures = [_part("image_url", "media/ramp.png")] if "image" in kinds else []
        conversations += [
            [_turn(_part("input_audio", sound_base64(5)), _text("What can you hear?")), answer],
            [
                _turn(
                    _part("audio_url", "media/tone.wav"),
                    *pictures,
                    _text("Say what the sound is, and what the picture is."),
                ),
                answer,
            ],
        ]
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path
