"""Tones in place of speech: espeak-ng need not be there."""

import wave
from pathlib import Path

import numpy as np

from benchmarks.models.tiny_omni.data import speech


def write_tone(path: Path, digit: int, voices: speech.Voices, generator: np.random.Generator) -> None:
    """Write a WAV whose tone tells the digit; called like `speech.write_spoken`."""
    time = np.arange(int(generator.uniform(0.3, 0.6) * speech.SAMPLING_RATE)) / speech.SAMPLING_RATE
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(speech.SAMPLING_RATE)
        file.writeframes((8000 * np.sin(2 * np.pi * 100 * (digit + 1) * time)).astype("<i2").tobytes())
