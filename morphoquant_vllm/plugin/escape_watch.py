"""Counts escapes and massive tokens while a model is served, in some layers and steps, and reports them.

The counts lie in one tensor on the device. Each counted layer adds to its part inside its op (`counted_layer`). Before
a counted step of requests the watch sets the number of tokens. After it the watch copies the counts to the host.
Neither waits for the device. Dummy steps of vLLM and padding count nothing. A thread reports the copied counts.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.worker_base import WorkerWrapperBase

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.escape_counts import COLUMNS
from morphoquant_vllm.plugin.additional_config import Watch
from morphoquant_vllm.plugin.counted_layer import Counter, Gate
from morphoquant_vllm.plugin.escape_metrics import MetricsFolder
from morphoquant_vllm.plugin.escape_report import Drift, RowCounts, calibrated_rates, counts_by_row, summary
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)
# Mark of the function that calls a worker's watch at each step.
_MARK = "counts_escapes"


def refuse_partial_steps(config: VllmConfig) -> None:
    """MorphoQuantError if a layer of this engine may get a part of a step's tokens."""
    parallel = config.parallel_config
    reasons = {
        "microbatching": parallel.use_ubatching,
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        "context parallelism": parallel.prefill_context_parallel_size > 1,
        "fast prefill": config.cache_config.kv_sharing_fast_prefill,
    }
    for reason, holds in reasons.items():
        if holds:
            raise MorphoQuantError(
                f"--additional-config: watch_escapes does not count with {reason}, whose layers get a part of the "
                "tokens; leave one of the two out"
            )


def choose_layers(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` layers, in order, one of each equal range; all if there are fewer.

    The place in the range moves on, so that not all are of one kind, as down_proj.
    """
    wanted = min(wanted, count)
    starts = [index * count // wanted for index in range(wanted)] + [count]
    return [start + index % (starts[index + 1] - start) for index, start in enumerate(starts[:-1])]


@dataclass(frozen=True)
class WatchedLayer:
    """A quantized linear of the decoder, or a list of experts: its name in the checkpoint, and K over all ranks."""

    stored: str
    in_features: int


class EscapeWatch:
    """The counts of one model in one process, and their reports."""

    def __init__(self, settings: Watch, rows: tuple[str, ...], metrics: MetricsFolder | None, report: Any) -> None:
        """`report` is that of the calibration, a JSON value or None."""
        self.settings, self.rows, self.metrics = settings, rows, metrics
        self._report = report
        self.layers: dict[str, WatchedLayer] = {}
        # Set when the first layer is loaded: index of each counted layer, and its K on this rank (0 until it counts).
        self.chosen: dict[str, int] = {}
        self.channels = torch.empty(0, dtype=torch.int64)
        self.counts = self.copied = torch.empty(0, dtype=torch.int64)
        self.gate = Gate(torch.empty(0))
        self.steps = 0
        self.calibrated: dict[str, float] = {}
        self.first_rank = True
        self._lock = threading.Lock()
        self._reporter: threading.Thread | None = None
        self._reported: dict[str, RowCounts] = {}
        self._drift = Drift({})

    def add(self, name: str, stored: str, in_features: int) -> None:
        """Make a layer known. All are before the first is loaded."""
        self.layers[name] = WatchedLayer(stored, in_features)

    def counter(
        self, name: str, rank: int, *, split: bool, backend: str, prepared: list[Tensor], record: ActivationRecord
    ) -> Counter | None:
        """The counter of a loaded layer; None if it is not chosen.

        `split` says that each tensor-parallel rank has a part of the input. The first rank counts the other inputs.
        """
        if not self.chosen:
            self._choose(record.inverse.device)
        self.first_rank = rank == 0
        if name not in self.chosen or (rank and not split):
            return None
        index = self.chosen[name]
        self.channels[index] = record.channel_order.numel()
        massive = record.massive_channel, record.massive_low, record.massive_high
        return Counter(self.gate, self.counts[index], backend, prepared, massive)

    def _choose(self, device: torch.device) -> None:
        names = list(self.layers)
        self.chosen = {
            names[layer]: index for index, layer in enumerate(choose_layers(len(names), self.settings.layers))
        }
        shape = (len(self.chosen), len(self.rows), len(COLUMNS))
        self.channels = torch.zeros(len(self.chosen), dtype=torch.int64)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.copied = torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.gate.live = torch.zeros((), dtype=torch.int64, device=device)
        chosen = [self.layers[name] for name in self.chosen]
        self.calibrated = calibrated_rates(self._report, {layer.stored: layer.in_features for layer in chosen})
        self._report, self._drift = None, Drift(self.calibrated)
        logger.info_once(
            "MorphoQuant: escapes are counted in one step of every %d, in %d of %d layers",
            *(self.settings.every, len(self.chosen), len(names)),
        )

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around a step of requests with this many tokens: every n-th is counted."""
        if not tokens or not self.chosen:
            yield
            return
        number, self.steps = self.steps, self.steps + 1
        if number % self.settings.every:
            self.gate.skips = True
            try:
                yield
            finally:
                self.gate.skips = False
            return
        if self._reporter is None:
            self._start()
        self.gate.live.fill_(tokens)
        try:
            yield
        finally:
            self.gate.live.zero_()
            with self._lock:
                self.copied.copy_(self.counts, non_blocking=True)

    def _start(self) -> None:
        # The thread holds no reference: the watch ends with its model.
        arguments = weakref.ref(self), self.settings.seconds
        self._reporter = threading.Thread(target=_report_until_gone, args=arguments, daemon=True, name="morphoquant")
        self._reporter.start()

    def row_counts(self) -> dict[str, RowCounts]:
        """The copied counts since the start, by row."""
        with self._lock:
            copied = self.copied.clone()
        return counts_by_row(copied, self.channels, self.rows)

    def report(self) -> None:
        """Write the metrics and log the rates since the last report, if there are new counts."""
        rows = self.row_counts()
        new = {name: row.since(self._reported.get(name, RowCounts())) for name, row in rows.items()}
        new = {name: row for name, row in new.items() if row.tokens}
        if not new:
            return
        self._reported = rows
        if self.metrics is not None and not self.metrics.write(rows, self.calibrated):
            logger.warning_once("MorphoQuant: escapes are only in the log: %s cannot be written", self.metrics.path)
        if not self.first_rank:
            return
        logger.info("MorphoQuant: escapes: %s", summary(new, self.calibrated))
        for line in self._drift.warnings(rows):
            logger.warning("MorphoQuant: %s", line)


def _report_until_gone(reference: weakref.ref[EscapeWatch], seconds: float) -> None:
    while (watch := reference()) is not None:
        watch.report()
        del watch
        time.sleep(seconds)


def patch_steps() -> None:
    """Let every step of vLLM's workers in this process go through the watch of their model.

    vLLM has no hook around a step, and a replayed CUDA graph calls nothing inside the model.
    """
    original = WorkerWrapperBase.execute_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def execute_model(self: WorkerWrapperBase, scheduler_output: Any) -> Any:
        watch = getattr(self.vllm_config.quant_config, "escape_watch", None)
        if watch is None:
            return original(self, scheduler_output)
        with watch.step(scheduler_output.total_num_scheduled_tokens):
            return original(self, scheduler_output)

    setattr(execute_model, _MARK, True)
    WorkerWrapperBase.execute_model = execute_model
