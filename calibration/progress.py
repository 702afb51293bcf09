"""The progress of a calibration: a bar on a terminal, one line per block elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from calibration.blocks.loop import BlockResult


class BlockProgress:
    """Shows block, loss and time left; a context manager whose instances are `calibrate`'s on_block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._seen = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("block {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}"),
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

    def __call__(self, result: BlockResult) -> None:
        """Show one finished block."""
        done = result.index + 1
        self._seen += 1
        loss = "-" if result.loss is None else f"{result.loss:.4f}"
        if self._bar is None:
            # Blocks that an earlier run finished are not part of this run's time.
            left = (time.monotonic() - self._start) / self._seen * (result.count - done)
            self._console.print(f"block {done}/{result.count}  loss {loss}  about {left:.0f} s left", highlight=False)
            return
        if self._task is None:
            # The bar starts with the first block: earlier steps, such as loading, log their progress.
            self._bar.start()
            self._task = self._bar.add_task("", total=result.count, completed=result.index, loss=loss)
        self._bar.update(self._task, completed=done, loss=loss)
