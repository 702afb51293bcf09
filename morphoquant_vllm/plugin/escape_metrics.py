"""Escape counts on vLLM's page /metrics. Workers write them to files, and the server's process reads these.

Workers are processes of their own, and vLLM's statistics have no place for a plugin. The server's process names a
folder before the workers start, and gives prometheus_client a collector. Asked for the page, the collector adds up the
workers' files.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from morphoquant_vllm.plugin.escape_report import RowCounts
from morphoquant_vllm.plugin.log import plugin_logger

logger = plugin_logger(__name__)

# Name on the page, after "morphoquant:" -> field of RowCounts and help.
COUNTERS = {
    "counted_codes": ("codes", "Activation codes in the counted layers and steps."),
    "counted_escapes": ("escapes", "Counted codes outside the 4-bit grid."),
    "counted_inputs": ("inputs", "Counted tokens times counted layers."),
    "counted_massive_inputs": ("massive_inputs", "Counted inputs that were massive tokens."),
}
CALIBRATED = "calibrated_escape_rate"


@dataclass(frozen=True)
class MetricsFolder:
    """The folder of the workers' files. Plain data: it goes to the workers with the configuration."""

    path: Path
    # Id of the process that shows the page.
    process: int

    def write(self, rows: Mapping[str, RowCounts], calibrated: Mapping[str, float]) -> bool:
        """In a worker: replace this process's file. False if the folder cannot be written, as on another machine."""
        content = {"rows": {name: asdict(row) for name, row in rows.items()}, "calibrated": dict(calibrated)}
        file = self.path / f"{os.getpid()}.json"
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(content), encoding="utf-8")
            partial.replace(file)
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Remove the folder, in the process that named it; a forked process inherits the exit handler."""
        if os.getpid() == self.process:
            shutil.rmtree(self.path, ignore_errors=True)


class EscapeCollector(Collector):
    """The sums of the workers' files, as metrics; none while no worker has counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> list[Metric]:
        """Nothing: several engines of a process may have the same metrics."""
        return []

    def collect(self) -> Iterator[Metric]:
        contents = []
        for path in sorted(self.folder.glob("*.json")):
            # A worker's file is whole or absent.
            with suppress(OSError, ValueError):
                contents.append(json.loads(path.read_text(encoding="utf-8")))
        if not contents:
            return
        names = sorted({name for content in contents for name in content["rows"]})
        for metric, (field, text) in COUNTERS.items():
            family = CounterMetricFamily(f"morphoquant:{metric}", text, labels=["row"])
            for name in names:
                family.add_metric([name], sum(content["rows"].get(name, {}).get(field, 0) for content in contents))
            yield family
        calibrated = {name: rate for content in contents for name, rate in content["calibrated"].items()}
        gauge = GaugeMetricFamily(f"morphoquant:{CALIBRATED}", "Escape rate in calibration.", labels=["row"])
        for name, rate in sorted(calibrated.items()):
            gauge.add_metric([name], rate)
        yield gauge


def open_metrics() -> MetricsFolder:
    """In the process that configures the engine: name a folder, and show the counts that workers write to it."""
    # The name cannot be guessed. The folder exists only if a worker counts.
    folder = MetricsFolder(Path(tempfile.gettempdir()) / f"morphoquant-{secrets.token_hex(16)}", os.getpid())
    REGISTRY.register(EscapeCollector(folder.path))
    atexit.register(folder.remove)
    return folder
