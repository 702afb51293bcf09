"""Tiny models and a folder of media, for the tests of rendering."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.calibration.media_files import encode_audio, encode_video, png, sine
from tests.tiny_models import build_tiny_llama, build_tiny_omni, build_tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen2_5_vl(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of media: a 120 x 90 image, audio of 2.3 s and of 1 ms, and 25 frames at 8 frames per second."""
    path = tmp_path_factory.mktemp("media")
    (path / "image.png").write_bytes(png(Image.new("RGB", (120, 90), (10, 200, 30))))
    (path / "long.wav").write_bytes(encode_audio([sine(2.3, 48000, 440)], 48000, "wav", "pcm_s16le"))
    (path / "short.wav").write_bytes(encode_audio([sine(0.001, 16000, 440)], 16000, "wav", "pcm_s16le"))
    (path / "minute.wav").write_bytes(encode_audio([sine(60, 8000, 440)], 8000, "wav", "pcm_s16le"))
    soundfile.write(path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (path / "video.mp4").write_bytes(encode_video(25, 8))
    (path / "frame.mp4").write_bytes(encode_video(1, 8))
    return path
