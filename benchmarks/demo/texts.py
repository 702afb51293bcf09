"""Real English text that every installation has: no download, no copy in this repository."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

# Of the topics of Python's reference manual, in alphabetical order, the first 75 % calibrate.
CALIBRATION_SHARE = 0.75


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip() for part in parts)


def python_topics() -> tuple[str, str]:
    """Python's reference manual as pydoc ships it: (text to calibrate on, topics held back)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    cut = int(len(names) * CALIBRATION_SHARE)
    return _join(topics[name] for name in names[:cut]), _join(topics[name] for name in names[cut:])


def excerpts(text: str, count: int, size: int) -> str:
    """`count` excerpts of `size` characters, evenly spaced over `text` in its order; all of a short one."""
    if len(text) <= count * size:
        return text
    stride = (len(text) - size) / max(1, count - 1)
    return _join(text[round(index * stride) :][:size] for index in range(count))


def torch_documentation() -> str:
    """The docstrings of torch.nn's classes."""
    from torch import nn

    classes = [getattr(nn, name) for name in sorted(dir(nn)) if inspect.isclass(getattr(nn, name))]
    return _join(dict.fromkeys(inspect.getdoc(cls) or "" for cls in classes))
