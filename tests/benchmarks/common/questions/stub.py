"""A small HTTP server that speaks as much of OpenAI's API as benchmarks.omni_eval asks of it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers the first `answers` questions, then fails."""

    answers = 1000
    refuse = ""
    # Questions with one of these texts, separated by "|", break a server that stays healthy, or does not.
    breaks = ""
    healthy = True
    asked: list[dict[str, Any]]
    # Maps the text of a question to the answer.
    say: Callable[[str], str]
    # Both workers must be inside a request at once, if a test checks that.
    together: threading.Barrier | None = None

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200 if self.healthy and len(self.asked) < self.answers else 503, {})
            return
        self._reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.together is not None:
            self.together.wait(10)
        text = next(part["text"] for part in reversed(body["messages"][-1]["content"]) if part["type"] == "text")
        if self.refuse and self.refuse in text:
            self._reply(400, {"error": {"message": "prompt too long", "type": "BadRequestError"}})
        elif self.breaks and any(part in text for part in self.breaks.split("|")):
            self._reply(500, {"error": {"message": "cannot decode"}})
        elif len(self.asked) >= self.answers:
            self._reply(500, {"error": {"message": "engine died"}})
        else:
            self.asked.append(body)
            message = {"role": "assistant", "content": self.say(text)}
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
def serving(
    say: Callable[[str], str] = lambda text: "B", **settings: Any
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URL of a running server, and the questions it has answered."""
    handler = type("Configured", (Handler,), {"asked": [], "say": staticmethod(say), **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
