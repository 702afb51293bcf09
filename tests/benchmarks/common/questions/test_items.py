"""Cells of a data set that hold nothing, or something else than a question's text."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from benchmarks.common.questions.datasets import air_bench, mmmu, scienceqa, video_mme
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.common.questions.miniature import write_air_bench, write_mmmu, write_scienceqa, write_video_mme


@pytest.mark.parametrize(
    ("reader", "write", "column", "wanted"),
    [
        (scienceqa, write_scienceqa, "question", "a text in question of row 1"),
        (scienceqa, write_scienceqa, "choices", "a list of texts in choices of row 1"),
        (scienceqa, write_scienceqa, "answer", "an integer in answer of row 1"),
        (mmmu, write_mmmu, "question", "a text in question of row 1"),
        (mmmu, write_mmmu, "answer", "a text in answer of row 1"),
        (video_mme, write_video_mme, "options", "a list of texts in options of row 1"),
    ],
)
def test_an_empty_cell_is_refused_and_not_asked(
    reader: ModuleType, write: Any, column: str, wanted: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = next(iter(sorted(tmp_path.rglob(f"{reader.SPLIT}-*.parquet"))))
    rows = parquet.read_table(path).to_pylist()
    rows[0][column] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(MorphoQuantError, match=f"{path}: not the layout of {reader.NAME}: expected {wanted}"):
        list(reader.load(tmp_path))


def test_an_entry_without_a_question_and_json_that_is_nested_deep_are_refused(tmp_path: Path) -> None:
    write_air_bench(tmp_path)
    path = tmp_path / "Foundation" / "Foundation_meta.json"
    entries = json.loads(path.read_text())
    entries[1]["question"] = None
    path.write_text(json.dumps(entries))
    with pytest.raises(MorphoQuantError, match="expected a text in question of entry 1; found None"):
        list(air_bench.load(tmp_path))
    path.write_text("[" * 100_000)
    with pytest.raises(MorphoQuantError, match="expected JSON"):
        list(air_bench.load(tmp_path))
