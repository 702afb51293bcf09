"""The prompts and the rule of a public copy of the paper's code: for rows that stand beside the paper's own.

Read from KanghoonYoon/morphoquant_hif4, MorphoQuant-static_1.1/modules/evaluator.py (commit a1ad4fd); none of its code
is here. Differences: it counts a ScienceQA answer that took more than 10 s as wrong, and skips sounds that are missing.
The letter of an open MMMU question is compared with its answer, so nearly all of them are wrong by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.common.questions.items import Item, Media
from benchmarks.common.questions.scoring import chosen

# Prompts and rules of each benchmark's authors, or of the paper's code.
OWN, PAPER = "own", "paper"
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)


@dataclass(frozen=True)
class Asked:
    """How the paper's code asks one benchmark."""

    parts: Callable[[Item], tuple[str | Media, ...]]
    max_tokens: int
    # Letters that its rule reads.
    letters: str


def prompted(item: Item, benchmark: str) -> Item:
    """The question as the paper's code asks it."""
    return replace(item, parts=ASKED[benchmark].parts(item))


def score(benchmark: str) -> Callable[[Item, str], str]:
    """The rule of the paper's code for a benchmark."""
    return lambda item, response: chosen(item, letter(response, ASKED[benchmark].letters))


def letter(response: str, letters: str) -> str | None:
    """The first "(A)" or "A.", else the first letter that is a word, else the last capital of `letters`."""
    for form in (rf"\(([{letters}])\)|([{letters}])\.", rf"\b([{letters}])\b"):
        if found := re.search(form, response):
            return next(group for group in found.groups() if group)
    capitals = re.findall(f"[{letters}]", response)
    return capitals[-1] if capitals else None


def _options(choices: Mapping[str, str], form: str = "{}. {}\n") -> str:
    return "".join(form.format(name, text) for name, text in choices.items())


def _scienceqa(item: Item) -> tuple[str | Media, ...]:
    context = f"背景：{item.context}\n" if item.context else ""
    text = (
        f"题目：{item.question}\n{context}选项：\n{_options(item.choices)}"
        "请你仔细阅读题目，只能输出一个大写字母（A、B、C 或 D），不要输出任何解释或多余的内容。"
    )
    return ("请回答科学题目。", text, *item.images)


def _mmmu(item: Item) -> tuple[str | Media, ...]:
    question = re.sub("<image [123]>", "", item.question).strip()
    text = f"Question: {question}\nOptions:\n{_options(item.choices)}Answer with the option letter directly."
    return ("Answer the following question based on the provided information.", *item.images, text)


def _video_mme(item: Item) -> tuple[str | Media, ...]:
    # The published options begin with their letter, too.
    options = _options(item.choices, "({0}) {0}. {1}\n")
    text = f"Question: {item.question}\nOptions:\n{options}Answer with the option letter directly (e.g., A, B, C, D)."
    return (item.parts[0], text)


def _air_bench(item: Item) -> tuple[str | Media, ...]:
    options = _options({name: text for name, text in item.choices.items() if text or name in "AB"})
    text = (
        f"Please listen to the audio and answer the question.\nQuestion: {item.question}\nChoices:\n{options}"
        "Please choose the most suitable answer from options A, B, C, and D. Only output the option letter (e.g., A)."
    )
    return (item.parts[0], text)


# By the benchmark's name.
ASKED = {
    "scienceqa": Asked(_scienceqa, 10, "A-L"),
    "mmmu": Asked(_mmmu, 20, "A-F"),
    "video-mme": Asked(_video_mme, 32, "A-D"),
    "air-bench": Asked(_air_bench, 256, "A-D"),
}
