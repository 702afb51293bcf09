"""Compares an untested vLLM's interfaces with those that the plugin uses, once for each version.

The comparison imports much of vLLM, so another process makes it. Its lines are kept in the cache directory.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from morphoquant_vllm import compat, environment
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import check_regular
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)
COMPARE = (sys.executable, "-m", "morphoquant_vllm.compat")
_TIMEOUT = 180
# Last line of a kept comparison: a file without it was not written to its end.
_END = "end"
_SHOWN = 3


def may_serve() -> bool:
    """Whether the installed vLLM has every interface that the plugin needs. One line tells of an untested version.

    Worker processes do not compare: the process that started them did.
    """
    version = compat.installed_version()
    if version.partition("+")[0] in compat.TESTED or multiprocessing.parent_process() is not None:
        return True
    lines = _kept_lines(version)
    if lines is None:
        logger.warning("MorphoQuant: vLLM %s is not tested, and its interfaces could not be compared", version)
        return True
    gone = [line for line in lines if f" is {compat.MISSING}" in line]
    shown = "; ".join((gone or lines)[:_SHOWN])
    if gone:
        logger.error(
            "MorphoQuant: vLLM %s lacks %d needed interfaces (%s); install one of %s",
            *(version, len(gone), shown, ", ".join(compat.TESTED)),
        )
    elif lines:
        logger.warning(
            "MorphoQuant: vLLM %s is not tested; it differs in %d interfaces: %s", version, len(lines), shown
        )
    else:
        logger.warning(
            "MorphoQuant: vLLM %s is not tested; all interfaces that the plugin uses are as in %s",
            *(version, compat.TESTED[-1]),
        )
    return not gone


def _kept_lines(version: str) -> list[str] | None:
    """The differences of a version, one line each: kept ones, or compared now; None if neither is possible."""
    cache = environment.cache_directory()
    # Another version of this package may use other interfaces.
    used = hashlib.sha256(repr(sorted(compat.INTERFACES.items())).encode()).hexdigest()[:12]
    kept = None if cache is None else cache / "compared" / f"vllm-{version}-{used}.txt"
    lines = None if kept is None else _read(kept)
    if lines is not None:
        return lines
    lines = _compare()
    if lines is not None and kept is not None:
        _keep(kept, lines)
    return lines


def _read(file: Path) -> list[str] | None:
    """The lines that `_keep` wrote; None if the file is missing or not whole."""
    try:
        # A reader would wait for ever at a FIFO.
        check_regular(file)
        *lines, last = file.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, ValueError, MorphoQuantError):
        return None
    return lines if last == _END else None


def _compare() -> list[str] | None:
    # Without plugins: the process would compare again.
    variables = environment.without_plugins()
    try:
        done = subprocess.run(
            COMPARE, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=variables
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # The last line counts the others, which name one difference each.
    return done.stdout.splitlines()[:-1] if done.returncode in (0, 1) and done.stdout else None


def _keep(file: Path, lines: list[str]) -> None:
    """Write the lines; a cache that cannot be written costs a comparison at the next start."""
    staged = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text("".join(f"{line}\n" for line in (*lines, _END)), encoding="utf-8")
        staged.replace(file)
    except OSError as error:
        logger.debug("MorphoQuant: %s is not written: %s", file, error)
        with suppress(OSError):
            staged.unlink(missing_ok=True)
