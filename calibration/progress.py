"""The progress of a calibration: a bar on a terminal, one line per block elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from calibration.blocks.results import BlockResult, LayerBegins


class BlockProgress:
    """Shows block, layer, loss and time left; a context manager.

    Its instances are `calibrate`'s on_block, and their `begin` is its on_layer.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._seen = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._loss = "-"
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("block {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[layer]}"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> BlockProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None and self._bar is not None:
            self._bar.stop()

    def begin(self, layer: LayerBegins) -> None:
        """Show the input that is quantized next; lines without a terminal are one per block."""
        self._update(layer.index, layer.count, layer.layer)

    def __call__(self, result: BlockResult) -> None:
        """Show one finished block."""
        done = result.index + 1
        self._seen += 1
        self._loss = "-" if result.loss is None else f"{result.loss:.4f}"
        if self._bar is None:
            # Blocks that an earlier run finished are not part of this run's time.
            left = (time.monotonic() - self._start) / self._seen * (result.count - done)
            line = f"block {done}/{result.count}  loss {self._loss}  about {left:.0f} s left"
            self._console.print(line, highlight=False)
            return
        self._update(done, result.count, "")

    def _update(self, done: int, count: int, layer: str) -> None:
        """Show on the bar that `done` of `count` blocks are finished, and the layer that is worked on."""
        if self._bar is None:
            return
        if self._task is None:
            # The bar starts with the first layer: earlier steps, such as loading, log their progress.
            self._bar.start()
            self._task = self._bar.add_task("", total=count, completed=done, loss=self._loss, layer=layer)
        self._bar.update(self._task, completed=done, loss=self._loss, layer=layer)
