"""Spoken digits: espeak-ng in many voices, speeds and pitches."""

from __future__ import annotations

import shutil
import subprocess
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.data.conversations import Media
from calibration.data.media import decode_audio
from morphoquant_vllm.errors import MorphoQuantError

SAMPLING_RATE = 16000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")


@dataclass(frozen=True)
class Voices:
    """The speakers of one split: espeak-ng's voice variants, words per minute, and pitches (0 to 99)."""

    variants: tuple[str, ...]
    speeds: tuple[int, ...]
    pitches: tuple[int, ...]


TRAINING_VARIANTS = (
    "m1", "m2", "m4", "m5", "m6", "m7", "f1", "f2", "f4", "f5",
    "adam", "andy", "anika", "benjamin", "caleb", "david", "edward", "iven", "linda", "max", "robert", "steph",
)  # fmt: skip
TRAINING = Voices(TRAINING_VARIANTS, (130, 150, 170, 190, 210), (35, 45, 55, 65))
CALIBRATION = Voices(TRAINING_VARIANTS, (135, 175, 195), (38, 50, 62))
# Neither a variant, nor a speed, nor a pitch of the other splits.
TEST = Voices(("m3", "m8", "f3", "john", "belinda", "michel", "paul", "shelby"), (140, 160, 180, 200), (40, 48, 60))


def require_espeak() -> str:
    """The espeak-ng command; MorphoQuantError naming the package if it is missing."""
    command = shutil.which("espeak-ng")
    if command is None:
        raise MorphoQuantError("espeak-ng, which speaks the benchmark's digits, is missing; apt-get install espeak-ng")
    return command


def write_spoken(path: Path, digit: int, voices: Voices, generator: np.random.Generator) -> None:
    """Write the digit's word, spoken by one of `voices`, as a 16-bit mono WAV of SAMPLING_RATE Hz."""
    accent, variant = generator.choice(ACCENTS), generator.choice(voices.variants)
    command = [require_espeak(), "-z", "--stdout", "-v", f"{accent}+{variant}"]
    command += ["-s", str(generator.choice(voices.speeds)), "-p", str(generator.choice(voices.pitches)), WORDS[digit]]
    spoken = subprocess.run(command, capture_output=True, check=False)
    if spoken.returncode:
        raise MorphoQuantError(
            f"espeak-ng cannot speak with {accent}+{variant} ({spoken.stderr.decode(errors='replace').strip()}); "
            "apt-get install espeak-ng-data"
        )
    samples = decode_audio(Media("audio", spoken.stdout, f"espeak-ng {accent}+{variant}"), SAMPLING_RATE)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
