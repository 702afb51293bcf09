"""The report file of a checkpoint, whole and damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.output.report_file import read_report
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE


def write(directory: Path, **report: Any) -> Path:
    (directory / REPORT_FILE).write_text(json.dumps(report))
    return directory


def layer(**measured: Any) -> dict[str, Any]:
    return {"layers": {"model.q": measured}}


def test_what_is_not_stated_is_unknown(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    report = read_report(write(tmp_path, layers={"model.q": {}}, of_a_later_version=[1]))
    assert report is not None and report.escape_rate is None and report.data.samples is None
    assert report.layers["model.q"].escape_rate is None and report.layers["model.q"].modality_rows == {}


@pytest.mark.parametrize(
    ("report", "field"),
    [
        ({"escape_rate": "x"}, "escape_rate"),
        ({"escape_rate": 1.5}, "escape_rate"),
        ({"escape_rate": -0.1}, "escape_rate"),
        ({"escape_rate": True}, "escape_rate"),
        ({"escape_rate": 10**4000}, "escape_rate"),
        ({"format": 2}, "format"),
        ({"layers": []}, "layers"),
        ({"layers": {"model.q": 3}}, "layers.model.q"),
        (layer(escape_rate=0.5), "layers.model.q.escape_rate"),
        (layer(escape_rate={"all": None}), "layers.model.q.escape_rate.all"),
        (layer(escape_rate={"[/red]": 0.5}), "layers.model.q.escape_rate"),
        (layer(output_error=[0.5]), "layers.model.q.output_error"),
        (layer(output_error=1e300), "layers.model.q.output_error"),
        (layer(modality_rows=[]), "layers.model.q.modality_rows"),
        (layer(modality_rows={"image": True}), "layers.model.q.modality_rows.image"),
        ({"data": {"samples": "many"}}, "data.samples"),
        ({"data": {"tokens": {"text": -1}}}, "data.tokens.text"),
        ({"data": {"tokens": {"text": 2.5}}}, "data.tokens.text"),
        ({"settings": None}, "settings"),
        ({"versions": {"torch": 2}}, "versions.torch"),
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused_by_name(report: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError) as refusal:
        read_report(write(tmp_path, **report))
    assert str(refusal.value).startswith(f"{tmp_path / REPORT_FILE}: {field}")
    assert str(refusal.value).endswith("copy it from the original checkpoint, or calibrate again")
    assert len(str(refusal.value)) < 700


def test_what_is_no_json_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / REPORT_FILE
    for content in ("{", "[]", '{"escape_rate": NaN}', "[" * 20_000, f'{{"escape_rate": {"9" * 5000}}}', "\0"):
        path.write_text(content)
        with pytest.raises(MorphoQuantError, match=REPORT_FILE):
            read_report(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(MorphoQuantError, match=REPORT_FILE):
        read_report(tmp_path)
