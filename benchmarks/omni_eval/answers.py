"""Keeps the responses of a run, one JSON line each as they come: a stopped run resumes from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"


class Answers:
    """Responses by question id in a folder that belongs to one run; `run` says which."""

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        """Open or start; MorphoQuantError if the folder holds answers of another run."""
        directory.mkdir(parents=True, exist_ok=True)
        place = directory / RUN_FILE
        if place.exists():
            earlier = json.loads(place.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*earlier, *run} if earlier.get(key) != run.get(key))
            if changed:
                raise MorphoQuantError(
                    f"{directory}: holds a run with another {', '.join(changed)} "
                    f"({', '.join(repr(earlier.get(key)) for key in changed)}); choose another --output"
                )
        else:
            place.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        self._path = directory / ANSWERS_FILE
        self.responses: dict[str, str | None] = {}
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        whole = b""
        for line in self._path.read_bytes().splitlines(keepends=True):
            # The last line of a killed run may be cut short.
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self.responses[entry["id"]] = entry["response"]
            whole += line
        self._path.write_bytes(whole)

    def add(self, name: str, response: str | None, note: str = "") -> None:
        """Keep a response; None with a note for a request that the server refused."""
        self.responses[name] = response
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": name, "response": response, **({"note": note} if note else {})}) + "\n")
