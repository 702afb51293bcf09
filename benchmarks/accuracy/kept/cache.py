"""Results on disk, one JSON file each. A hash of everything that a result depends on names its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.files import digest, write_atomically
from benchmarks.common.machine import commit, processor
from morphoquant_vllm.errors import MorphoQuantError

Key = Mapping[str, Any]


class Cache:
    """A directory of results; `key` is a JSON object that names every setting a result depends on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, key: Key) -> Path:
        """File of the result of `key`; it need not exist."""
        return self.directory / f"{digest(key)[:32]}.json"

    def load(self, key: Key) -> dict[str, Any] | None:
        """The stored result, or None; MorphoQuantError if the file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] != json.loads(json.dumps(key)):
                raise ValueError("it holds another key")
            result: dict[str, Any] = stored["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise MorphoQuantError(f"{path}: damaged result ({error}); delete it and run again") from error
        return result

    def store(self, key: Key, result: Mapping[str, Any]) -> None:
        """Write the result atomically, with the machine and the commit that made it."""
        made = {"machine": processor(), "commit": commit()}
        write_atomically(self.path(key), json.dumps({"key": key, "made": made, "result": result}, indent=1) + "\n")

    def made(self, key: Key) -> dict[str, Any]:
        """The "machine" and the "commit" that made the stored result of `key`; older results do not say."""
        found: dict[str, Any] = json.loads(self.path(key).read_text(encoding="utf-8")).get("made", {})
        return found
