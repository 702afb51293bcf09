"""The table: the paper's figures as they are published, ours beside them."""

from pathlib import Path
from typing import Any

from benchmarks.common.questions.summary import figures
from benchmarks.paper import table
from tests.benchmarks.paper.published import options

NAMES = ["scienceqa", "mmmu", "video-mme", "air-bench"]


def row(**more: Any) -> dict[str, Any]:
    found = figures(["right"] * 8 + ["wrong", "unparsed"])
    by = {"modality": {"text": found, "text+image": figures(["right", "wrong", "wrong", "wrong"])}}
    summary = {"all": found, "by": by, "seconds": 90.0}
    return {"name": "x", "bits": "4/4", "source": "this run", "benchmarks": dict.fromkeys(NAMES, summary), **more}


def rendered(names: list[str] = NAMES, **more: Any) -> list[str]:
    result = {"title": "m", "benchmarks": names, "paper": table.paper_rows(), "rows": [row(**more)], "notes": ["own"]}
    return table.render(result).splitlines()


def test_the_papers_rows_are_cited_and_have_no_intervals() -> None:
    lines = rendered()
    assert "| method | W/A | ScienceQA | MMMU | Video-MME | AIR-Bench | source |" in lines
    assert "| FP16 | 16/16 | 79.39 | 44.78 | 57.33 | 66.25 | arXiv 2606.04349, Table |" in lines
    assert "| MorphoQuant | 4/4 | 76.63 | 45.11 | 54.33 | 65.09 | arXiv 2606.04349, Table |" in lines
    assert sum("arXiv 2606.04349, Table |" in line for line in lines) == 6


def test_our_rows_have_intervals_sizes_rates_and_times() -> None:
    lines = rendered(bytes=3_400_000_000, escape_rate=0.0392, calibration_seconds=5400.0)
    (own,) = (line for line in lines if line.endswith("| this run |"))
    assert own.startswith("| x | 4/4 | 80.00 (49.02 to 94.33) | 80.00")
    assert "| x | 3.40 GB | 3.92 % | 90.0 min | 6.0 min | 40 | 4 | 0 |" in lines
    assert lines[-1] == "- own"


def test_what_is_not_known_of_a_server_is_a_dash() -> None:
    assert "| x | - | - | - | 6.0 min | 40 | 4 | 0 |" in rendered()


def test_the_figure_of_questions_with_an_image_is_told_beside_that_of_all() -> None:
    assert "- ScienceQA's questions with an image alone: x 25.00." in rendered()
    assert "image alone" not in "".join(rendered(["mmmu"]))
    images = row()
    del images["benchmarks"]["scienceqa"]["by"]["modality"]["text"]
    assert table.image_notes([images], NAMES) == []


def test_benchmarks_that_were_not_asked_have_no_column() -> None:
    lines = rendered(["mmmu"])
    assert "| method | W/A | MMMU | source |" in lines
    assert "| QLoRA | 4/16 | 43.56 | arXiv 2606.04349, Table |" in lines


def test_notes_say_which_questions_were_asked() -> None:
    sources = {"held_out": {"video-mme": ["a", "b"], "air-bench": []}}
    found = table.notes(options(Path("x"), "--limit", "3", "--scienceqa", "image"), sources, "calibration data: y")
    assert found[0].startswith("ScienceQA: the questions of test with an image;")
    assert found[1:] == [
        "Calibration data: y.",
        "Media held out for calibration, and their questions left out of every row: 2 of video-mme.",
        "A trial: only the first 3 questions of each benchmark were asked.",
    ]
    assert table.notes(options(Path("x")), {}, "y")[0].startswith("ScienceQA: all questions of test;")
