"""Runs against a small HTTP server: several requests at a time, a server that goes away, a run that goes on."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.omni_eval.__main__ import main
from tests.benchmarks.omni_eval.miniature import WRITERS


class Handler(BaseHTTPRequestHandler):
    """Speaks as much of OpenAI's API as is asked of it: answers the first `answers` questions, then fails."""

    answers = 1000
    refuse = ""
    asked: list[dict[str, Any]]
    # Both workers must be inside a request at once, where a test wants to see that.
    together: threading.Barrier | None = None

    def do_GET(self) -> None:
        self._reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.together is not None:
            self.together.wait(10)
        text = body["messages"][0]["content"][-1]["text"]
        if self.refuse and self.refuse in text:
            self._reply(400, {"error": {"message": "prompt too long", "type": "BadRequestError"}})
        elif len(self.asked) >= self.answers:
            self._reply(500, {"error": {"message": "engine died"}})
        else:
            self.asked.append(body)
            message = {"role": "assistant", "content": "B"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            self._reply(
                200, {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
            )

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URL of a running server, and the questions it has answered."""
    handler = type("Configured", (Handler,), {"asked": [], **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(name: str, directory: Path, url: str, output: Path, *more: str) -> dict[str, Any]:
    main([name, str(directory), "--base-url", url, "--output", str(output), "--retries", "0", *more])
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def refusal(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_run_and_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving(together=threading.Barrier(2)) as (url, asked):
        summary = run("scienceqa", data, url, tmp_path / "out", "--concurrency", "2")
    assert len(asked) == 4
    assert all(body["model"] == "tiny" and body["temperature"] == 0 for body in asked)
    assert (summary["benchmark"], summary["model"], summary["questions"]) == ("ScienceQA", "tiny", 4)
    assert summary["all"]["accuracy"] == 0.5
    assert {name: entry["accuracy"] for name, entry in summary["by"]["modality"].items()} == {
        "text": 0.0,
        "text+image": 1.0,
    }
    printed = capsys.readouterr().out
    assert "ScienceQA: accuracy with 95% interval" in printed and "social science" in printed


def test_a_server_that_stops_answering_ends_the_run_which_then_goes_on(tmp_path: Path) -> None:
    data, output = WRITERS["scienceqa"](tmp_path / "data"), tmp_path / "out"
    with serving(answers=3) as (url, _):
        message = refusal("scienceqa", data, url, output, "--concurrency", "1")
    assert "stopped answering (Error code: 500" in message
    assert message.endswith("; 3 of 4 questions are answered and kept: run the same command again to go on")
    assert not (output / "summary.json").exists()
    assert len((output / "answers.jsonl").read_text().splitlines()) == 3
    # A killed run leaves half a line.
    with (output / "answers.jsonl").open("a") as file:
        file.write('{"id": "test-3", "resp')
    with serving() as (url, asked):
        summary = run("scienceqa", data, url, output)
    assert len(asked) == 1, "what was answered is not asked again"
    assert summary["all"]["answered"] == 4 and summary["all"]["accuracy"] == 0.5


def test_no_server_at_all(tmp_path: Path) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving() as (url, _):
        pass
    assert "no OpenAI server answers" in refusal("scienceqa", data, url, tmp_path / "out")
    message = refusal("scienceqa", data, url, tmp_path / "out", "--model", "tiny")
    assert "; 0 of 4 questions are answered and kept" in message


def test_a_refused_request_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    with serving(refuse="Question 1?") as (url, _):
        summary = run("scienceqa", data, url, tmp_path / "out")
    assert (summary["all"]["refused"], summary["all"]["answered"]) == (1, 4)
    notes = [json.loads(line).get("note", "") for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert sum("prompt too long" in note for note in notes) == 1


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    data, output = WRITERS["scienceqa"](tmp_path / "data"), tmp_path / "out"
    with serving() as (url, _):
        run("scienceqa", data, url, output)
        message = refusal("scienceqa", data, url, output, "--model", "other")
        assert "holds a run with another model ('tiny'); choose another --output" in message
        assert "another questions" in refusal("scienceqa", data, url, output, "--limit", "2")
