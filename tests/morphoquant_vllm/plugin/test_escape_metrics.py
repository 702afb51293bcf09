"""Workers' counts on the page that prometheus_client makes of its registry."""

import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from morphoquant_vllm.plugin.escape_metrics import EscapeCollector, MetricsFolder, open_metrics
from morphoquant_vllm.plugin.escape_report import RowCounts


def page(folder: Path) -> list[str]:
    registry = CollectorRegistry()
    registry.register(EscapeCollector(folder))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_the_page_adds_up_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MetricsFolder(tmp_path / "counts", os.getpid())
    assert page(folder.path) == []
    assert folder.write({"text": RowCounts(5, 10, 1, 640, 20)}, {"text": 0.04})
    assert folder.write({"text": RowCounts(6, 12, 2, 768, 30)}, {"text": 0.04})
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert folder.write({"text": RowCounts(1, 1, 0, 64, 3), "image": RowCounts(2, 2, 0, 128, 0)}, {})
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert page(folder.path) == [
        'morphoquant:counted_codes_total{row="image"} 128.0',
        'morphoquant:counted_codes_total{row="text"} 832.0',
        'morphoquant:counted_escapes_total{row="image"} 0.0',
        'morphoquant:counted_escapes_total{row="text"} 33.0',
        'morphoquant:counted_inputs_total{row="image"} 2.0',
        'morphoquant:counted_inputs_total{row="text"} 13.0',
        'morphoquant:counted_massive_inputs_total{row="image"} 0.0',
        'morphoquant:counted_massive_inputs_total{row="text"} 2.0',
        'morphoquant:calibrated_escape_rate{row="text"} 0.04',
    ]


def test_only_the_process_that_named_the_folder_removes_it(tmp_path: Path) -> None:
    other = MetricsFolder(tmp_path / "counts", os.getpid() + 1)
    assert other.write({}, {})
    other.remove()
    assert other.path.is_dir()
    MetricsFolder(other.path, os.getpid()).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    assert not MetricsFolder(tmp_path / "gone" / "counts", 0).write({}, {})


def test_several_engines_of_a_process_share_the_registry() -> None:
    assert open_metrics().path != open_metrics().path
