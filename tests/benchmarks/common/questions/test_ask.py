"""What is the trouble of one request, and what means that the server has stopped."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.common.questions import ask
from benchmarks.common.questions.items import Item
from benchmarks.common.questions.run import Endpoint, answered
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.common.questions.stub import serving

CONSOLE = Console(file=io.StringIO())
ITEMS = [Item(str(number), (f"Question {number}?",), {}, ("B",)) for number in range(4)]


def responses(url: str, output: Path, concurrency: int = 1, **run: Any) -> dict[str, str | None]:
    settings = {"benchmark": "x", "max_tokens": 4, **run}
    server = Endpoint(url, retries=0, concurrency=concurrency)
    return asyncio.run(answered(ITEMS, output, settings, server, CONSOLE))[1].responses


@pytest.mark.parametrize("broken", [0, 3], ids=["the first", "the last"])
def test_a_question_that_breaks_a_healthy_server_is_refused_and_the_others_go_on(tmp_path: Path, broken: int) -> None:
    with serving(breaks=f"Question {broken}?") as (url, asked):
        found = responses(url, tmp_path)
        assert len(asked) == 3
        assert found == {str(number): None if number == broken else "B" for number in range(4)}
        assert responses(url, tmp_path) == found and len(asked) == 3, "it is not asked again"
    assert "cannot decode" in (tmp_path / "answers.jsonl").read_text()


def test_a_server_that_answers_nothing_has_stopped_though_it_calls_itself_healthy(tmp_path: Path) -> None:
    with serving(breaks="Question") as (url, _), pytest.raises(MorphoQuantError, match="0 of 4 questions"):
        responses(url, tmp_path)
    assert not (tmp_path / "answers.jsonl").exists()


def test_many_broken_requests_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "MOST_BROKEN", 1)
    with serving(breaks="Question") as (url, asked), pytest.raises(MorphoQuantError, match="stopped answering"):
        responses(url, tmp_path)
    assert asked == []


def test_broken_requests_with_an_answer_between_them_are_not_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "MOST_BROKEN", 1)
    with serving(breaks="Question 0?|Question 2?") as (url, _):
        assert responses(url, tmp_path) == {"0": None, "1": "B", "2": None, "3": "B"}


def test_a_server_whose_health_is_not_good_has_stopped(tmp_path: Path) -> None:
    with (
        serving(breaks="Question 1?", healthy=False) as (url, _),
        pytest.raises(MorphoQuantError, match="1 of 4 questions are answered"),
    ):
        responses(url, tmp_path)


def test_a_system_prompt_comes_first(tmp_path: Path) -> None:
    with serving() as (url, asked):
        responses(url, tmp_path / "with", system="Be brief.")
        responses(url, tmp_path / "without")
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in asked[-1]["messages"]] == ["user"]


def test_a_dying_server_refuses_nothing_while_another_worker_gets_its_last_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(self: ask.Asking) -> bool:
        await asyncio.sleep(0.5)
        return False

    monkeypatch.setattr(ask.Asking, "is_healthy", slow)
    with serving(breaks="Question 0?") as (url, _), pytest.raises(MorphoQuantError, match="stopped answering"):
        responses(url, tmp_path, concurrency=2)
    assert '"response": null' not in (tmp_path / "answers.jsonl").read_text()
