"""The plugin's settings in vLLM's `--additional-config`, which vLLM hands to every worker.

vllm serve OUT --additional-config '{"morphoquant": {"lm_head": "int8", "watch_escapes": {"every": 16}}}'
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError

SETTINGS = "morphoquant"
NAMES = frozenset(("lm_head", "watch_escapes"))
HEADS = ("16bit", "int8")
# Of numbers: eleven days of seconds.
LARGEST = 10**6
_EXAMPLE = '{"morphoquant": {"lm_head": "int8", "watch_escapes": {}}}'


@dataclass(frozen=True)
class Watch:
    """How escapes are counted while a model is served."""

    # Every n-th engine step is counted.
    every: int = 16
    # In this many layers, spread over the decoder; in all if it has fewer.
    layers: int = 8
    # Between two reports.
    seconds: float = 10.0


@dataclass(frozen=True)
class Settings:
    """All settings; `watch` is None if escapes are not counted."""

    lm_head: str = HEADS[0]
    watch: Watch | None = None


def read_settings(additional_config: Any) -> Settings:
    """The plugin's settings; MorphoQuantError for an unknown one, or a value out of range."""
    # Keys of other plugins and platforms may stand beside ours.
    every = additional_config if isinstance(additional_config, dict) else {}
    misplaced = [key for key in every if key in NAMES or (key != SETTINGS and str(key).lower() == SETTINGS)]
    if misplaced:
        raise MorphoQuantError(f"--additional-config: {misplaced[0]!r} would be ignored here; write {_EXAMPLE}")
    given = every.get(SETTINGS, {})
    if not isinstance(given, dict) or not given.keys() <= NAMES:
        raise MorphoQuantError(
            f"--additional-config: '{SETTINGS}' takes only the settings lm_head and watch_escapes, got {given!r}; "
            f"write {_EXAMPLE}"
        )
    lm_head = given.get("lm_head", HEADS[0])
    if lm_head not in HEADS:
        raise MorphoQuantError(f"--additional-config: lm_head is {lm_head!r}; it can be one of {list(HEADS)}")
    return Settings(lm_head, _watch(given["watch_escapes"]) if "watch_escapes" in given else None)


def _watch(given: Any) -> Watch:
    names = [field.name for field in fields(Watch)]
    if not isinstance(given, dict) or not given.keys() <= set(names):
        raise MorphoQuantError(
            f"--additional-config: watch_escapes is an object with {', '.join(names)}, got {given!r}; write {{}} for "
            f"their defaults"
        )
    for name, value in given.items():
        kinds = (int, float) if name == "seconds" else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value <= LARGEST:
            number = f"a number above 0, at most {LARGEST}" if name == "seconds" else f"an integer of 1 to {LARGEST}"
            raise MorphoQuantError(f"--additional-config: watch_escapes: {name} is {value!r}; it must be {number}")
    return Watch(**given)
