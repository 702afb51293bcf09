"""The table and the page of a comparison, and names that are not trusted."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from calibration.compare.measure import Comparison, Group
from calibration.compare.show import comparison_data, comparison_table, render
from morphoquant_vllm.errors import MorphoQuantError

COMPARISON = Comparison(
    {"image": Group(1, 10, 20.0, 30.0, 1.0, 9), "all": Group(2, 20, 40.0, 60.0, 2.5, 15)}, [1.0, 0.0], [4.0, 0.0]
)


def test_the_figures_are_means_of_the_sums(tmp_path: Path) -> None:
    data = comparison_data(tmp_path / "a", tmp_path / "b", COMPARISON)
    assert list(data["modalities"]) == ["all", "image"]
    row = data["modalities"]["all"]
    assert row["divergence"] == 0.125 and row["agreement"] == 0.75
    assert row["first_perplexity"] == pytest.approx(2.718281828**2)
    assert data["blocks"][0] == 0.5


def test_table_and_page_have_the_same_figures(tmp_path: Path) -> None:
    data = comparison_data(tmp_path / "a", tmp_path / "b", COMPARISON)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(data))
    text, page = console.export_text(), render(data)
    for figure in ("7.389", "20.09", "0.12500", "75.0%", "0.5000", "nan"):
        assert figure in text and figure in page, figure
    assert "<script" not in page and "http" not in page.replace("<!doctype html>", "")


def test_a_name_is_no_markup(tmp_path: Path) -> None:
    data = comparison_data(tmp_path / "<script>x", tmp_path / "[red]b", COMPARISON)
    assert "<script" not in render(data)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(data))
    assert "[red]b" in console.export_text()


def test_data_without_a_text_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="predict no text token"):
        comparison_data(tmp_path, tmp_path, Comparison())
