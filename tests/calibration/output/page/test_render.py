"""The page of `morphoquant report`: its content and its refusals."""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration import cli
from calibration.output.distributions import DISTRIBUTIONS_FILE, write_distributions
from calibration.output.inspection import inspect_data, percent
from calibration.output.page.render import write_report
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import REPORT_FILE
from tests.checkpoints import write_config, write_random_checkpoint

FIGURE = re.compile(r'<figure id="([^"]+)"><img alt="([^"]+)" src="data:image/png;base64,([^"]+)">')


def colours(pixels: np.ndarray) -> int:
    """Number of different colours in [..., 3] bytes."""
    return np.unique(pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)).size


@pytest.fixture(scope="module")
def page(omni_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("html") / "page.html"
    write_report(omni_directory, output)
    return output.read_text()


def test_it_is_self_contained(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page and "<script" not in page and "url(" not in page
    assert "a &lt;b&gt;&amp;amp; b" in page and "<b>&amp; b" not in page


def test_every_picture_shows_something_and_says_what(page: str) -> None:
    figures = {name: (alt, data) for name, alt, data in FIGURE.findall(page)}
    chosen = [f"{kind}-{number}" for number in range(1, 7) for kind in ("channels", "codes")]
    assert list(figures) == ["sizes", "losses", "dispersion", *chosen]
    for name, (alt, data) in figures.items():
        assert len(alt) > 20, name
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        assert colours(pixels) > 50, name


def test_escapes_are_drawn(page: str) -> None:
    pictures = {name: data for name, _, data in FIGURE.findall(page)}
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures["channels-1"]))).convert("RGB")).astype(int)
    vermilion = np.abs(pixels - (0xD5, 0x5E, 0x00)).sum(-1) < 60
    # More than the line in the legend.
    assert int(vermilion.sum()) > 500


def test_figures_of_every_layer_and_the_settings_are_there(omni_directory: Path, page: str) -> None:
    data = inspect_data(omni_directory)
    for layer in data["layers"]:
        assert layer["name"].removeprefix("thinker.model.layers.") in page
        assert percent(layer["output_error"]) in page and percent(layer["escape_rate"]["all"]) in page
    report = json.loads((omni_directory / REPORT_FILE).read_text())
    for name in (*report["settings"], *report["versions"], "tokens, audio"):
        assert f"<td>{name}</td>" in page
    assert percent(data["totals"]["escape_rate"]) in page


def test_the_same_checkpoint_gives_the_same_page(omni_directory: Path, page: str, tmp_path: Path) -> None:
    write_report(omni_directory, tmp_path / "again.html", ["*.0.self_attn.q_proj"])
    figures = dict.fromkeys(FIGURE.findall((tmp_path / "again.html").read_text()))
    assert len(figures) == 5 and figures.keys() <= dict.fromkeys(FIGURE.findall(page)).keys()


def test_layers_can_be_chosen(omni_directory: Path, tmp_path: Path) -> None:
    content = write_report(omni_directory, tmp_path / "page.html", ["*.1.mlp.down_proj", "*.0.self_attn.k_proj"])
    assert [entry.name.split("layers.")[1] for entry in content.chosen] == ["0.self_attn.qkv_proj", "1.mlp.down_proj"]


def test_without_recorded_distributions_the_rest_is_shown(omni_directory: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(omni_directory, tmp_path / "old"))
    (old / DISTRIBUTIONS_FILE).unlink()
    write_report(old, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert [name for name, _, _ in FIGURE.findall(page)] == ["sizes", "losses"]
    assert page.count("Not recorded: this checkpoint was calibrated by a version that kept no distributions") == 2


def test_refusals_leave_nothing(omni_directory: Path, tmp_path: Path) -> None:
    def refused(directory: Path, expected: str, patterns: tuple[str, ...] = ()) -> None:
        with pytest.raises(MorphoQuantError, match=expected):
            write_report(directory, tmp_path / "page.html", patterns)
        assert not (tmp_path / "page.html").exists()

    refused(tmp_path, "config.json: no such file")
    refused(omni_directory, "'\\*.nothing' matches no layer", ("*.nothing",))
    lost = Path(shutil.copytree(omni_directory, tmp_path / "lost"))
    (lost / REPORT_FILE).unlink()
    refused(lost, f"{REPORT_FILE}: missing, so there is nothing to report")


def test_the_command(
    omni_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["morphoquant", "report", str(omni_directory), *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    chosen = ("--layer", "*.0.mlp.down_proj")
    assert run(*chosen) == 0
    place = tmp_path / "a <b>&amp; b-report.html"
    first = place.stat()
    assert first.st_size > 100_000
    assert capsys.readouterr().out == f"{place.name}: 8 inputs, 1 drawn channel by channel\n"
    assert run(*chosen) == 1
    assert capsys.readouterr().err == f"error: {place.name}: exists; choose another --output, or pass --overwrite\n"
    assert run(*chosen, "--overwrite") == 0
    assert place.stat().st_ino != first.st_ino


def test_odd_names_settings_and_figures_are_shown_as_text(tmp_path: Path) -> None:
    """Of a checkpoint that `verify` accepts: what stands in its files is escaped, short, and any finite number."""
    directory = tmp_path / "odd"
    spec = write_random_checkpoint(directory)
    spec = write_config(directory, replace(spec, rows=("smell", *spec.rows[1:]), created_by="<i>" + "x" * 10_000))
    largest = torch.finfo(torch.bfloat16).max
    records = {}
    for name, layers in spec.shared_inputs().items():
        ranges = {
            f"smell.{kind}": torch.full((4,), sign * largest).bfloat16()
            for kind, sign in (("minimum", -1), ("maximum", 1))
        }
        records[name] = {
            "channels": torch.arange(4, dtype=torch.int32),
            **ranges,
            "smell.dispersion": torch.full((spec.layers[layers[0]].in_features,), largest).bfloat16(),
            "smell.codes": torch.zeros(256, dtype=torch.int64),
        }
    write_distributions(directory, records)
    layers = {name: {"output_error": 3e38, "escape_rate": {"smell": 1.0, "all": 1.0}} for name in spec.layers}
    settings = {"<b>\u202e\ud800": {"deep": ["<u>"]}, "long": "y" * 10_000, "escape_budget": -1.0, "number": 10**300}
    report = {"escape_rate": 0, "layers": layers, "settings": settings, "versions": {"torch": "<s>"}}
    (directory / REPORT_FILE).write_text(json.dumps(report))
    write_report(directory, tmp_path / "page.html")
    page = re.sub(r'src="[^"]*"', "", (tmp_path / "page.html").read_text())
    assert "escapes, smell" in page and "&lt;b&gt;\\u202e\\ud800" in page
    assert not re.search("<(i|s|u|b>[^<]*u202e)>|x{300}|y{300}|0{250}", page)
