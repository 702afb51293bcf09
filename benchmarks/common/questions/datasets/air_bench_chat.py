"""AIR-Bench Chat (Yang et al., 2024, arXiv 2402.07729), as published (qyang1021/AIR-Bench-Dataset): open questions
about sounds, whose answers a judge model scores against a reference.

Layout and prompt: OFA-Sys/AIR-Bench, Inference_Chat.py (commit 09f83c1). The questions are in Chat/Chat_meta.json, the
audio in Chat/<task_name>_<dataset_name>/<path>, and the question is asked unchanged. Judging prompt: score_chat.py
(commit 1b5bd7f). It gives the judge a description of the sound, the reference (`answer_gt`) and the response, and asks
for two scores from 1 to 10. Scores, and the tasks' categories: cal_score.py (commit 2c35f44). It expects two integers
of at most 10, and reads judgements in either order of the two answers ("cir" is the reversed one).

As in the paper, every answer is judged in both orders and gets the mean. The published "Average" is that of speech,
sound, music and mixed audio, where mixed is the mean of the last two categories. The README's leaderboard confirms it.

The judge is asked at temperature 0; the authors ask gpt-4-0125-preview at 1, or at 2 every other time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from scipy.stats import t

from benchmarks.common.questions.datasets.air_bench import audio, entries
from benchmarks.common.questions.items import Item
from benchmarks.common.questions.scoring import REFUSED, UNPARSED
from benchmarks.common.questions.summary import CONFIDENCE, grouped, layout

NAME = "AIR-Bench Chat"
SPLIT = "Chat"
MAX_TOKENS = JUDGE_TOKENS = 1024
FIELDS = ("path", "question", "answer_gt", "meta_info", "task_name", "dataset_name")
CATEGORIES = {
    "speech_QA": "speech",
    "speech_dialogue_QA": "speech",
    "sound_QA": "sound",
    "sound_generation_QA": "sound",
    "music_QA": "music",
    "music_generation_analysis_QA": "music",
    "speech_and_sound_QA": "speech_and_sound",
    "speech_and_music_QA": "speech_and_music",
}
MIXED = ("speech_and_sound", "speech_and_music")
# Ids of the two judgements of an answer: which of them the judge reads first.
ORDERS = ("reference first", "response first")
HIGHEST = 10
JUDGING = """You are a helpful and precise assistant for checking the quality of the answer.
[Detailed Audio Description]
{description}
[Question]
{question}
[The Start of Assistant 1s Answer]
{first}
[The End of Assistant 1s Answer]
[The Start of Assistant 2s Answer]
{second}
[The End of Assistant 2s Answer]
[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question \
and audio description displayed above. AI assistants are provided with detailed audio descriptions and questions.
Please rate the helpfulness, relevance, accuracy, and comprehensiveness of their responses. \
Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better overall \
performance. \
Please output a single line containing only two values indicating the scores for Assistant 1 and 2, respectively. \
The two scores are separated by a space."""


def load(directory: Path, split: str = SPLIT) -> Iterator[Item]:
    """Questions of a local copy, named by their index in the file; MorphoQuantError if its layout differs."""
    for number, entry in entries(directory, split, FIELDS, NAME):
        yield Item(
            id=str(number),
            parts=(audio(directory / split, entry), entry["question"]),
            choices={},
            answers=(entry["answer_gt"],),
            groups={
                "subject": CATEGORIES.get(entry["task_name"], entry["task_name"]),
                "modality": "text+audio",
                "task": entry["task_name"],
                "data set": entry["dataset_name"],
            },
            description=entry["meta_info"],
        )


def judgements(items: Sequence[Item], responses: Mapping[str, str | None]) -> list[Item]:
    """The questions to the judge: two for each answer of the model."""
    asked = []
    for item in items:
        response = responses.get(item.id)
        if response is None:
            continue
        pair = (item.answers[0], response)
        for order, (first, second) in zip(ORDERS, (pair, pair[::-1]), strict=True):
            question = str(item.parts[-1])
            text = JUDGING.format(description=item.description, question=question, first=first, second=second)
            asked.append(Item(f"{item.id}, {order}", (text,), {}, ()))
    return asked


def scores(judgement: str | None) -> tuple[int, int] | None:
    """The two numbers of a judgement; None unless it consists of exactly two integers from 0 to 10."""
    found = (judgement or "").strip().replace("\n", "").split(" ")
    if len(found) != len(ORDERS) or not all(part.isdecimal() and int(part) <= HIGHEST for part in found):
        return None
    return int(found[0]), int(found[1])


def verdict(name: str, judged: Mapping[str, str | None]) -> tuple[float, float] | None:
    """Mean scores of response and reference over both orders; None if a judgement is missing or not parsed."""
    first, second = (scores(judged.get(f"{name}, {order}")) for order in ORDERS)
    if first is None or second is None:
        return None
    return (first[1] + second[0]) / 2, (first[0] + second[1]) / 2


def summarise(
    items: Sequence[Item], responses: Mapping[str, str | None], judged: Mapping[str, str | None]
) -> dict[str, Any]:
    """Figures of the judged answers: "all", "by" every kind of group, and the published "average".

    The average is over four kinds of audio, and None if one of them is missing.
    """
    outcomes = [(item, REFUSED if responses.get(item.id) is None else verdict(item.id, judged)) for item in items]
    by = {kind: {name: figures(found) for name, found in groups.items()} for kind, groups in grouped(outcomes).items()}
    means = {name: entry["score"] for name, entry in by.get("subject", {}).items()}
    kinds = [*("speech", "sound", "music"), *MIXED]
    whole = all(means.get(name) is not None for name in kinds)
    average = fmean([*(means[name] for name in kinds[:3]), fmean(means[name] for name in MIXED)]) if whole else None
    return {"questions": len(items), "average": average, "all": figures([found for _, found in outcomes]), "by": by}


def figures(outcomes: Sequence[tuple[float, float] | str | None]) -> dict[str, Any]:
    """Mean scores of responses and references, and of the former Student's interval of the mean (None below two)."""
    judged = [found for found in outcomes if isinstance(found, tuple)]
    counts = {"judged": len(judged), UNPARSED: outcomes.count(None), REFUSED: outcomes.count(REFUSED)}
    found = [response for response, _ in judged]
    interval = None
    if len(found) > 1:
        reach = t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stdev(found) / len(found) ** 0.5
        interval = [float(fmean(found) - reach), float(fmean(found) + reach)]
    return {
        **counts,
        "score": fmean(found) if found else None,
        "interval": interval,
        "reference": fmean(reference for _, reference in judged) if judged else None,
    }


def table(summary: Mapping[str, Any]) -> Table:
    """The same for people."""
    average = "" if summary["average"] is None else f"; average of four kinds of audio {summary['average']:.2f}"
    title = f"{NAME}: scores of 10 with {CONFIDENCE:.0%} interval{average}"
    return layout(title, ("score", "interval", "reference", "judged", UNPARSED, REFUSED), summary, _cells)


def _cells(entry: Mapping[str, Any]) -> list[str]:
    score, reference = ("-" if entry[key] is None else f"{entry[key]:.2f}" for key in ("score", "reference"))
    interval = "-" if entry["interval"] is None else "{:.2f} to {:.2f}".format(*entry["interval"])
    return [score, interval, reference, *(str(entry[key]) for key in ("judged", UNPARSED, REFUSED))]
