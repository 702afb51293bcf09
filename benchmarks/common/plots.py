"""Panels of axes, and a figure as PNG: the first and last step of every plot."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from morphoquant_vllm.errors import MorphoQuantError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes, [rows, columns]; MorphoQuantError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MorphoQuantError(
            f"the Python package '{error.name}' is missing, which draws the plots; pip install matplotlib"
        ) from error
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure) -> bytes:
    """The figure as PNG, without matplotlib's version: the same data make the same file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
