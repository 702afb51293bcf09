"""Fingerprint of everything that the checkpoint's bytes depend on. A run may resume only if it is unchanged."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import calibration
from calibration.data.conversations import Conversation, Media, PlainText
from calibration.model.source import Source
from calibration.output.report import PACKAGE, package_version
from calibration.output.written_files import copied_files
from calibration.quantize.int8_products import has_exact_products
from calibration.settings.recipe import Recipe
from calibration.work.code_files import code_files
from calibration.work.durable_files import hash_file
from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE

# Differences that an error message lists.
_SHOWN = 6


def fingerprint(
    recipe: Recipe,
    device: torch.device,
    source: Source,
    data: Sequence[Conversation | PlainText],
    *,
    skip_bad: bool = False,
    processes: int = 1,
) -> dict[str, Any]:
    """Everything that the checkpoint's bytes depend on, as a JSON object: settings, versions, model and data.

    Files, including weight files, are identified by the SHA-256 of their content: size and time can stay the same when
    the content changes. The number of threads is not included, because a resumed run uses the recorded number. The
    number of processes is included.
    """
    settings = recipe.model_dump(mode="json") | {
        # With several processes, each has a different GPU.
        "device": str(device) if processes == 1 else device.type,
        "processes": processes,
        "skip_bad": skip_bad,
    }
    return {
        "settings": settings,
        "versions": {
            PACKAGE: package_version(),
            "code": _code_hash(),
            "python": platform.python_version(),
            **{
                name: package_version(name)
                for name in ("torch", "transformers", "safetensors", "numpy", "pillow", "av")
            },
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            "cpu": " ".join((platform.machine(), torch.backends.cpu.get_cpu_capability(), *_instructions())),
        },
        "model": _model_files(source),
        "data": [[item.source, content_hash(item)] for item in data],
    }


def _instructions() -> list[str]:
    """Names of the integer products and kernels of this machine; empty if it multiplies codes in float32."""
    served = backends.BACKENDS[backends.select_backend(torch.device("cpu"))].instructions()
    return ["int8 products"] * has_exact_products() + ([f"{served} kernels"] if served else [])


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences about the differences between the fingerprints `begun` and `now`."""
    changes = []
    for part in ("settings", "versions", "model"):
        old, new = begun[part], now[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name):
                continue
            if part == "model" or name == "code":
                changes.append(f"{'the package itself' if name == 'code' else name} has changed")
            else:
                changes.append(f"{name} was {_shown(old.get(name))}, now {_shown(new.get(name))}")
    return changes + _data_differences(begun["data"], now["data"])


def refuse_changes(work: Path, begun: Mapping[str, Any], now: Mapping[str, Any], finished: int) -> None:
    """Raise MorphoQuantError naming the differences, if there are any."""
    changes = differences(begun, now)
    if changes:
        more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise MorphoQuantError(
            f"{work}: was begun with other settings or data ({'; '.join(changes[:_SHOWN])}{more}); give those again, "
            f"choose another --work, or pass --restart, which drops its {finished} finished blocks"
        )


def _data_differences(old: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> list[str]:
    changes: list[str] = []
    for before, after in zip(old, new, strict=False):
        if before[0] != after[0]:
            # All later items are shifted, so they are not listed.
            return [*changes, f"where the data had {before[0]} it now has {after[0]}"]
        if before[1] != after[1]:
            changes.append(f"{after[0]} or its media have changed")
    if len(old) != len(new):
        changes.append(f"the data were {len(old)} conversations and texts, now {len(new)}")
    return changes


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _code_hash() -> str:
    sha256 = hashlib.sha256()
    for name, path in code_files(Path(calibration.__file__).parent.parent).items():
        sha256.update(f"{name} {hash_file(path)}\n".encode())
    return sha256.hexdigest()


def _model_files(source: Source) -> dict[str, str]:
    plain = [Path(CONFIG_FILE), *copied_files(source.directory)]
    hashes = {str(path): hash_file(source.directory / path) for path in plain}
    weights = sorted({info.file for info in source.tensors.values()})
    return hashes | {path.name: hash_file(path) for path in weights}


def content_hash(item: Conversation | PlainText) -> str:
    """SHA-256 of a text, or of a conversation with its media."""
    if isinstance(item, PlainText):
        return hashlib.sha256(item.text.encode()).hexdigest()
    sha256 = hashlib.sha256()
    for message in item.messages:
        for part in message.parts:
            content = _media_hash(part) if isinstance(part, Media) else part.text
            kind = part.kind if isinstance(part, Media) else "text"
            sha256.update(json.dumps([message.role, kind, content]).encode() + b"\n")
        sha256.update(_json(message.fields))
    sha256.update(_json(item.template))
    return sha256.hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    # A table's row may hold values that JSON lacks, such as a date.
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"


def _media_hash(media: Media) -> str:
    if isinstance(media.content, bytes):
        return hashlib.sha256(media.content).hexdigest()
    try:
        return hash_file(media.content)
    except OSError as error:
        raise MorphoQuantError(f"{media.name}: cannot be read ({error.strerror}); check its permissions") from error
