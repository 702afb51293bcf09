"""The responses of a run, written as they come, one JSON line each. So a killed run can be continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_atomically
from morphoquant_vllm.errors import MorphoQuantError

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"


class Answers:
    """Responses by question id in a folder that belongs to one run; `run` says which."""

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        """Open or start; MorphoQuantError if the folder holds answers of another run, or a damaged line."""
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
            write_atomically(place, json.dumps(run, indent=2) + "\n")
        self._path = directory / ANSWERS_FILE
        self.responses, self.seconds, whole = read_answers(directory)
        if self._path.exists():
            # The last line of a killed run may be cut short. The others are not written again.
            os.truncate(self._path, whole)
        self._last = time.monotonic()

    def add(self, name: str, response: str | None, note: str = "") -> None:
        """Keep a response on disk; None with a note for a request that the server refused."""
        now = time.monotonic()
        # Since the answer before: the sum is the time of asking, however often a run was stopped.
        seconds, self._last = now - self._last, now
        entry = {"id": name, "response": response, "seconds": round(seconds, 3), **({"note": note} if note else {})}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.responses[name] = response
        self.seconds += seconds


def read_answers(directory: Path) -> tuple[dict[str, str | None], float, int]:
    """Responses by question id, the seconds that they took, and the bytes of the file's whole lines.

    A folder without answers has none. Raises MorphoQuantError for a damaged line.
    """
    path = directory / ANSWERS_FILE
    responses: dict[str, str | None] = {}
    seconds, whole = 0.0, 0
    if not path.exists():
        return responses, seconds, whole
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            responses[entry["id"]] = entry["response"]
            seconds += entry.get("seconds", 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise MorphoQuantError(f"{path}: line {number} is damaged; remove that line and run again") from error
        whole += len(line)
    return responses, seconds, whole
