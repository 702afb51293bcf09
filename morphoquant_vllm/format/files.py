"""Opens the files of a model directory. A file that is not regular or cannot be read is refused in one line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from morphoquant_vllm.errors import MorphoQuantError

COPY_AGAIN = "copy it again"
# The report of a calibration, beside the weights.
REPORT_FILE = "morphoquant_calibration.json"
# Deepest nesting of a JSON file. Files of models stay below half of it, and recursive functions can follow it.
DEEPEST_JSON = 64


def check_regular(path: Path) -> None:
    """Refuse a `path` that is not a regular file: a reader would wait for ever at a FIFO or a device.

    Links are followed. Raises FileNotFoundError if nothing is there, another OSError if it cannot be reached.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise MorphoQuantError(f"{path}: is not a regular file; {COPY_AGAIN}")


def check_entries(directory: Path) -> None:
    """Refuse a directory that is missing, or that holds anything but files, folders and links to them."""
    if not directory.is_dir():
        raise MorphoQuantError(f"{directory}: no such directory")
    try:
        for path in sorted(directory.iterdir()):
            if not path.is_dir():
                check_regular(path)
    except OSError as error:
        raise MorphoQuantError(f"{error.filename}: cannot be read ({error.strerror}); {COPY_AGAIN}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; MorphoQuantError naming the file if it does not hold one.

    NaN and Infinity, which are not JSON, are refused.
    """
    content = _read_json_value(path)
    if not isinstance(content, dict):
        raise MorphoQuantError(f"{path}: does not hold a JSON object; {COPY_AGAIN}")
    return content


def read_json_list(path: Path) -> list[Any]:
    """The JSON array in a file, as `read_json` reads an object."""
    content = _read_json_value(path)
    if not isinstance(content, list):
        raise MorphoQuantError(f"{path}: does not hold a JSON array; {COPY_AGAIN}")
    return content


def _read_json_value(path: Path) -> Any:
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise MorphoQuantError(f"{path}: no such file; is {path.parent} a model directory?") from error
    except RecursionError as error:
        raise MorphoQuantError(f"{path}: is nested too deep; {COPY_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise MorphoQuantError(f"{path}: cannot be read as JSON ({error}); {COPY_AGAIN}") from error
    if _depth(content) > DEEPEST_JSON:
        raise MorphoQuantError(f"{path}: is nested too deep; {COPY_AGAIN}")
    return content


def _depth(content: Any) -> int:
    """The depth of lists and objects nested in `content`."""
    depth, level = 0, [content]
    while level:
        containers = [value for value in level if isinstance(value, (dict, list))]
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
        depth += bool(containers)
    return depth


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An open safetensors file; MorphoQuantError naming it if it is missing, truncated or not safetensors."""
    try:
        check_regular(path)
        with safe_open(str(path), "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise MorphoQuantError(f"{path}: missing; {COPY_AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise MorphoQuantError(f"{path}: truncated or not safetensors ({error}); {COPY_AGAIN}") from error
