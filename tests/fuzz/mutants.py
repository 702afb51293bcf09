"""Mutants by number: the same seed and number make the same damage."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from safetensors import SafetensorError

from tests.checkpoints import seal_again
from tests.fuzz.byte_damage import damage_bytes
from tests.fuzz.file_damage import damage_place
from tests.fuzz.json_damage import damage_json
from tests.fuzz.tensor_damage import damage_header, damage_tensors

# How often a file is chosen, beside the others.
WEIGHTS = {"config.json": 5, "model.safetensors.index.json": 3, "morphoquant_calibration.json": 2}
SECOND = 0.25
RESEALED = 0.4


@dataclass(frozen=True)
class Mutant:
    """A change to a copy of the intact checkpoint."""

    number: int
    # The first damaged file, and its kind of damage.
    file: str
    kind: str
    steps: tuple[str, ...]
    # The lists and digests were made anew after the damage, as if the checkpoint had been written so.
    resealed: bool


def make_mutant(intact: Path, directory: Path, seed: int, number: int) -> Mutant:
    """Copy the intact checkpoint to `directory`, which is replaced, and damage it."""
    random = Random(f"{seed}:{number}")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(intact, directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    chosen = random.choices(files, [_weight(path) for path in files])[0]
    kind = _kind(chosen, random)
    steps = [_damage(directory, chosen, kind, random)]
    while random.random() < SECOND:
        other = random.choices(files, [_weight(path) for path in files])[0]
        steps.append(_damage(directory, other, _kind(other, random), random))
    resealed = random.random() < RESEALED and kind != "place" and _reseal(directory)
    return Mutant(number, str(chosen.relative_to(directory)), kind, tuple(steps), resealed)


def _weight(path: Path) -> int:
    return WEIGHTS.get(path.name, 4 if path.suffix == ".safetensors" else 1)


def _kind(path: Path, random: Random) -> str:
    own = {".json": ("json", "json", "json"), ".safetensors": ("tensors", "tensors", "tensors", "header", "bytes")}
    return random.choice((*own.get(path.suffix, ("bytes",)), "bytes", "bytes", "place"))


def _damage(directory: Path, path: Path, kind: str, random: Random) -> str:
    """Do it, or say that an earlier step has left nothing to damage in this way."""
    if not path.is_file() or path.is_symlink():
        return f"{path.name}: {kind} impossible"
    try:
        match kind:
            case "bytes":
                return damage_bytes(path, random)
            case "place":
                return damage_place(directory, path, random)
            case "header":
                return damage_header(path, random)
            case "tensors":
                return damage_tensors(directory, path, random)
        text, told = damage_json(json.loads(path.read_text()), random)
        path.write_text(text, encoding="utf-8")
        return f"{path.name}: {told}"
    # Earlier damage is in the way: of the file, of the index.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, SafetensorError) as error:
        return f"{path.name}: {kind} impossible ({type(error).__name__})"


def _reseal(directory: Path) -> bool:
    """Whether there was something to seal anew."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    before = path.read_bytes()
    try:
        seal_again(directory)
        old, new = (json.loads(content)["quantization_config"]["integrity"] for content in (before, path.read_bytes()))
    # It reads config.json as writers do: without care.
    except Exception:
        path.write_bytes(before)
        return False
    return old != new
