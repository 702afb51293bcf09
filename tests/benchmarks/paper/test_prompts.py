"""The prompts and the rule of the paper's code."""

from pathlib import Path

import pytest

from benchmarks.common.questions.items import Item, Media
from benchmarks.paper.prompts import ASKED, SYSTEM, letter, score
from benchmarks.paper.questions import BENCHMARKS, asked
from tests.benchmarks.paper.published import options, write_published


def prompts(name: str, directory: Path) -> list[list[str]]:
    """Texts and kinds of media of the questions, as the paper's code asks them."""
    found = asked(BENCHMARKS[name], directory / "data", options(directory, "--prompts", "paper"))
    return [[f"<{part.kind}>" if isinstance(part, Media) else part for part in item.parts] for item in found]


def test_every_benchmark_is_asked_as_the_papers_code_does(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    assert prompts("scienceqa", tmp_path)[1] == [
        "请回答科学题目。",
        "题目：Question 1?\n背景：Look at the picture.\n选项：\nA. Red.\nB. Green.\nC. Blue.\n"
        "请你仔细阅读题目，只能输出一个大写字母（A、B、C 或 D），不要输出任何解释或多余的内容。",
        "<image>",
    ]
    assert "背景" not in prompts("scienceqa", tmp_path)[0][1]
    instruction = "Answer the following question based on the provided information."
    closing = "Answer with the option letter directly."
    assert prompts("mmmu", tmp_path) == [
        [instruction, "<image>", f"Question: What does  show?\nOptions:\nA. A ramp\nB. A wall\n{closing}"],
        # Places of images in options stay.
        [instruction, *["<image>"] * 2, f"Question: Which is red?\nOptions:\nA. <image 1>\nB. <image 2>\n{closing}"],
        [instruction, "<image>", f"Question: How tall is ?\nOptions:\n{closing}"],
    ]
    video, text = prompts("video-mme", tmp_path)[0]
    assert video == "<video>" and "Options:\n(A) A. A square.\n(B) B. A circle.\n" in text
    sound, text = prompts("air-bench", tmp_path)[0]
    assert sound == "<audio>" and text.startswith("Please listen to the audio and answer the question.\nQuestion: ")


def test_choices_that_a_question_lacks_are_not_shown() -> None:
    item = Item("1", (Media("audio", "wav", b""),), {"A": "x", "B": "y", "C": ""}, ("A",), question="Which?")
    text = str(ASKED["air-bench"].parts(item)[1])
    assert "Choices:\nA. x\nB. y\nPlease choose" in text


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("B", "B"),
        ("B. $7", "B"),
        ("(B) $7", "B"),
        ("The answer is B.", "B"),
        ("**B**", "B"),
        ("A cat, so (B)", "B"),
        ("A cat", "A"),
        ("NoB", "B"),
        ("Z", None),
        ("b", None),
        ("", None),
    ],
)
def test_the_rule(response: str, found: str | None) -> None:
    assert letter(response, "A-D") == found


def test_an_open_question_of_mmmu_is_compared_by_its_letter() -> None:
    assert score("mmmu")(Item("1", (), {}, ("84",)), "84") == "unparsed"
    assert score("mmmu")(Item("1", (), {}, ("B",)), "B") == "right"
    # More letters than choices.
    assert score("scienceqa")(Item("1", (), {"A": "", "B": ""}, ("A",)), "L") == "wrong"


def test_the_system_prompt_goes_with_the_prompts_unless_another_is_given(tmp_path: Path) -> None:
    assert options(tmp_path).system == ""
    assert options(tmp_path, "--prompts", "paper").system == SYSTEM
    assert options(tmp_path, "--prompts", "paper", "--system", "").system == ""
    assert options(tmp_path, "--system", "Be brief.").system == "Be brief."
