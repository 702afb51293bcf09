"""The table: the paper's figures as they are published, ours beside them."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.questions.summary import figures
from benchmarks.paper import table
from benchmarks.paper.questions import BENCHMARKS
from tests.benchmarks.paper.published import options

NAMES = ["scienceqa", "mmmu", "video-mme", "air-bench"]


def row(**more: Any) -> dict[str, Any]:
    found = figures(["right"] * 8 + ["wrong", "unparsed"])
    by = {"modality": {"text": found, "text+image": figures(["right", "wrong", "wrong", "wrong"])}}
    summary = {"all": found, "by": by, "seconds": 90.0, "paper_rule": found}
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


def test_the_figure_by_the_rule_of_the_papers_code_is_told_where_it_differs() -> None:
    assert "rule of the paper's code" not in "".join(rendered())
    found = row()
    other = {**found["benchmarks"]["mmmu"], "paper_rule": figures(["right"] * 9 + ["wrong"])}
    found["benchmarks"] = {**found["benchmarks"], "mmmu": other}
    assert table.rule_notes([found], NAMES) == ["x, by the rule of the paper's code: MMMU 90.00."]


# The figures of the ablation, too.
SHARES = {
    "scienceqa": (4241, 2017, (75.81,)),
    "mmmu": (900, 847, (44.22,)),
    "video-mme": (2700, None, ()),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_papers_figures_are_shares_of_all_questions(name: str) -> None:
    def possible(figure: float, questions: int) -> bool:
        near = int(figure * questions / 100)
        return any(round(100 * right / questions, 2) == figure for right in range(near - 1, near + 3))

    every, other, more = SHARES[name]
    figures = [paper["accuracy"][name] for paper in table.paper_rows()] + list(more)
    assert all(possible(figure, every) for figure in figures)
    assert BENCHMARKS[name].questions == every
    if other is not None:
        assert not all(possible(figure, other) for figure in figures)


def test_benchmarks_that_were_not_asked_have_no_column() -> None:
    lines = rendered(["mmmu"])
    assert "| method | W/A | MMMU | source |" in lines
    assert "| QLoRA | 4/16 | 43.56 | arXiv 2606.04349, Table |" in lines


def test_notes_say_which_questions_were_asked() -> None:
    sources = {"held_out": {"video-mme": ["a", "b"], "air-bench": []}}
    found = table.notes(options(Path("x"), "--limit", "3", "--scienceqa", "image"), sources, "calibration data: y")
    assert found[0].startswith("Prompts and rules are those of each benchmark's authors")
    assert found[1] == "ScienceQA: the questions of test with an image."
    assert found[2:] == [
        "Calibration data: y.",
        "Media held out for calibration, and their questions left out of every row: 2 of video-mme.",
        "A trial: only the first 3 questions of each benchmark were asked.",
    ]
    other = table.notes(options(Path("x"), "--prompts", "paper"), {}, "y")
    assert "a public copy of the paper's code" in other[0] and other[1] == "ScienceQA: all questions of test."
