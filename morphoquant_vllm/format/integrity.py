"""A checkpoint's lists and hashes of itself: they show a missing tensor or a damaged file (format v3).

A v3 checkpoint lists the tensors that it carries over, the SHA-256 of each weight file, and a digest of each field of
config.json. Imports the standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

# Top-level fields of config.json that may change without changing the meaning of the weights. `quantization_config`
# has separate rules.
FREE_FIELDS = frozenset(
    (
        *("quantization_config", "_name_or_path", "_commit_hash", "transformers_version"),
        *("dtype", "torch_dtype", "use_cache"),
    )
)
# Bytes that are read and hashed per step.
CHUNK_BYTES = 1 << 22
# Hex digits of a field's SHA-256 that are kept: enough to notice damage, and short compared with the field.
DIGEST_DIGITS = 16
# What a new list of files beside the weights covers: all that are copied. Lists without a version cover fewer.
BESIDE_VERSION = 2


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256, in hex, of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Integrity:
    """The part of quantization_config that lists the content of the whole checkpoint."""

    # Weight files by name.
    files: dict[str, FileDigest]
    # Sorted names of the tensors outside quantized layers.
    carried: tuple[str, ...]
    # First digits of the SHA-256 of each field of config.json except FREE_FIELDS.
    config: dict[str, str]
    # The digest of quantization_config itself; see QuantizationSpec.settings_digest.
    settings: str
    # Files beside the weights by name, with folders; empty in older checkpoints. Loaders from before it ignore it.
    beside: dict[str, FileDigest] = field(default_factory=dict)
    # Which files `beside` covers; see format.beside. A file outside it may have been there, unlisted.
    beside_version: int = BESIDE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        return {
            "files": {name: asdict(file) for name, file in self.files.items()},
            "carried": list(self.carried),
            "config": self.config,
            "settings": self.settings,
            **({"beside": {name: asdict(file) for name, file in self.beside.items()}} if self.beside else {}),
            **({"beside_version": self.beside_version} if self.beside_version > 1 else {}),
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Integrity:
        """Parse the JSON object; KeyError, TypeError, AttributeError or ValueError if it is malformed."""
        files, beside = _digests(value["files"]), _digests(value.get("beside", {}), folders=True)
        carried, config = value["carried"], value["config"]
        if not files or not isinstance(carried, list) or not all(type(name) is str for name in carried):
            raise ValueError("files and carried must list the checkpoint's files and tensors")
        if not isinstance(config, dict) or not all(type(digest) is str for digest in config.values()):
            raise ValueError("config must hold a digest of each field")
        version = value.get("beside_version", 1)
        if type(version) is not int:
            raise ValueError("beside_version must be an integer")
        return Integrity(files, tuple(carried), dict(config), str(value["settings"]), beside, version)


def _digests(listed: Mapping[str, Any], *, folders: bool = False) -> dict[str, FileDigest]:
    """Sizes and hashes by name; with `folders` a name may have folders before it."""
    found = {str(name): FileDigest(**file) for name, file in listed.items()}
    for name, file in found.items():
        if type(file.bytes) is not int or type(file.sha256) is not str:
            raise ValueError(f"{name} has no size and SHA-256")
        parts = PurePosixPath(name).parts
        outside = not parts or name.startswith("/") or ".." in parts or "/".join(parts) != name
        if outside or (len(parts) > 1 and not folders) or not name.isprintable():
            raise ValueError(f"{name!r} is not a file name")
    return found


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """A short digest of each field of a config.json that decides the meaning of the weights."""
    return {name: digest(value) for name, value in sorted(config.items()) if name not in FREE_FIELDS}


def digest(value: Any) -> str:
    """A short digest of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def check_config(path: Path, config: Mapping[str, Any], integrity: Integrity) -> None:
    """Refuse a config.json, read from `path`, whose fields changed after the checkpoint was made."""
    now = config_digests(config)
    changed = sorted(
        name for name in now.keys() | integrity.config.keys() if now.get(name) != integrity.config.get(name)
    )
    if changed:
        more = f" and {len(changed) - 1} more fields" if len(changed) > 1 else ""
        raise MorphoQuantError(
            f"{path}: {changed[0]}{more} changed after the checkpoint was made; copy the file again "
            "(to serve with another setting, pass it with --hf-overrides)"
        )


def file_digest(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileDigest:
    """Size and SHA-256 of a file, which is read once; `on_bytes` gets the bytes of each chunk that was read."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return FileDigest(size, sha256.hexdigest())
