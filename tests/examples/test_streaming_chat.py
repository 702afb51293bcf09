"""The chat client against a small server that streams, and that waits until a piece is printed."""

import base64
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.server import free_port
from tests.benchmarks.common.questions.stub import Handler, serving
from tests.examples.running import run
from tests.tiny_conversations import image_bytes, sound_bytes

PATIENCE_SECONDS = 10


def stream(handler: Handler) -> None:
    """Answer with two pieces. The second one comes when the first was printed."""
    handler.asked.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    first = f"answer {len(handler.asked)}"
    send(handler, first)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (printed := sys.stdout.getvalue().endswith(first)) and time.monotonic() < deadline:
        time.sleep(0.01)
    send(handler, " in time" if printed else " too late")
    handler.wfile.write(b"data: [DONE]\n\n")


def send(handler: Handler, text: str) -> None:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [choice]}
    handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
    handler.wfile.flush()


def talk(monkeypatch: pytest.MonkeyPatch, questions: str, *arguments: str | Path) -> tuple[str, list[dict[str, Any]]]:
    """The client's output, and the requests that it sent."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    monkeypatch.setattr(sys, "stdout", output := io.StringIO())
    with serving(do_POST=stream) as (url, asked):
        run(monkeypatch, "streaming_chat.py", "--base-url", url, *arguments)
    return output.getvalue(), asked


def test_pieces_are_printed_as_they_come_and_media_go_with_the_first_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "purr.wav").write_bytes(sound_bytes(1, 0.2))
    (tmp_path / "cat.png").write_bytes(image_bytes(2))
    media = ("--sound", tmp_path / "purr.wav", "--image", tmp_path / "cat.png")
    output, asked = talk(monkeypatch, "What purrs?\nWhy?\n", *media)
    assert output == "answer 1 in time\nanswer 2 in time\n"
    image, sound, text = asked[0]["messages"][0]["content"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(image_bytes(2)).decode()}"
    assert base64.b64decode(sound["input_audio"]["data"]) == sound_bytes(1, 0.2)
    assert sound["input_audio"]["format"] == "wav" and text == {"type": "text", "text": "What purrs?"}
    question, answer, second = asked[1]["messages"]
    assert question == asked[0]["messages"][0]
    assert answer == {"role": "assistant", "content": "answer 1 in time"}
    assert second == {"role": "user", "content": [{"type": "text", "text": "Why?"}]}


def test_a_format_that_openai_does_not_know_goes_as_a_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "purr.FLAC").write_bytes(b"samples")
    _, asked = talk(monkeypatch, "What purrs?\n", "--sound", tmp_path / "purr.FLAC")
    url = asked[0]["messages"][0]["content"][0]["audio_url"]["url"]
    assert url == f"data:audio/flac;base64,{base64.b64encode(b'samples').decode()}"


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(SystemExit, match=rf"^error: no server answers at {url}; start one with vllm serve OUT$"):
        run(monkeypatch, "streaming_chat.py", "--base-url", url)


def test_a_missing_sound_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*none\.wav"):
        talk(monkeypatch, "What purrs?\n", "--sound", tmp_path / "none.wav")
