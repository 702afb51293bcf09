"""A crowd of clients for a running server: mixed requests, some of them bad or cut off, and what memory they leave.

The same seed sends the same requests in the same order.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from tests.tiny_conversations import image_data_url, sound_base64, write_video

CONCURRENCY = 16
# Shares of the kinds of requests, in percent. "cut off": the client leaves in the middle of a stream, or before it.
SHARES = {"text": 25, "image": 20, "sound": 15, "video": 10, "cut off": 10, "bad media": 12, "bad JSON": 8}
# Distinct media of each kind. Few enough that vLLM's own cache of them is full after a quarter of the requests.
POOL = 16
TEXT = "the user asks what picture sound video shows and how it ends in one short sentence or two"
SECONDS_OF_A_REQUEST = 120.0


@dataclass
class Memory:
    """Resident bytes of each process of a server's tree, by its id, while requests are answered."""

    # Requests answered at each sample.
    done: list[int] = field(default_factory=list)
    resident: list[dict[int, int]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def sample(self, root: psutil.Process, done: int) -> None:
        """Note the current memory of every process of the tree."""
        sizes = {}
        for process in (root, *root.children(recursive=True)):
            try:
                sizes[process.pid] = process.memory_info().rss
                self.names.setdefault(process.pid, process.name())
            except psutil.NoSuchProcess:
                continue
        self.done.append(done)
        self.resident.append(sizes)

    def between(self, first: float, last: float) -> dict[int, float]:
        """Median size of each process while this part of all requests was answered; shares from 0 to 1."""
        low, high = first * self.done[-1], last * self.done[-1]
        window = [sizes for done, sizes in zip(self.done, self.resident, strict=True) if low <= done <= high]
        assert window, "requests were answered faster than memory was looked at"
        return {pid: statistics.median(sizes.get(pid, 0) for sizes in window) for pid in self.names}


class Crowd:
    """Requests for one server: media of all kinds, good and bad."""

    def __init__(self, url: str, model: str, directory: Path) -> None:
        self.url, self.model = url, model
        self.videos = [_video(directory / f"{seed}.mp4", seed) for seed in range(POOL)]
        self.images = [image_data_url(100 + seed) for seed in range(POOL)]
        self.sounds = [sound_base64(200 + seed, 1.0 + 0.1 * seed) for seed in range(POOL)]
        # (kind, HTTP status), or (kind, name of an exception), of every request.
        self.ends: Counter[tuple[str, int | str]] = Counter()
        # Good requests that vLLM wanted once more.
        self.resent = 0

    def questions(self) -> list[list[dict[str, Any]]]:
        """The content of thirty fixed questions."""
        kinds = ["text"] * 12 + ["image"] * 7 + ["sound"] * 6 + ["video"] * 5
        return [self.content(kind, Random(1000 + index)) for index, kind in enumerate(kinds)]

    def content(self, kind: str, random: Random) -> list[dict[str, Any]]:
        """Parts of a message with one medium of this kind, or none."""
        text = {"type": "text", "text": " ".join(random.choices(TEXT.split(), k=random.randint(4, 40)))}
        if kind == "image":
            return [{"type": "image_url", "image_url": {"url": random.choice(self.images)}}, text]
        if kind == "sound":
            return [{"type": "input_audio", "input_audio": {"data": random.choice(self.sounds), "format": "wav"}}, text]
        if kind == "video":
            return [{"type": "video_url", "video_url": {"url": random.choice(self.videos)}}, text]
        return [text]

    def bad_content(self, random: Random) -> list[dict[str, Any]]:
        """A medium that cannot be decoded: noise, the wrong kind, the first half of a file, nothing at all."""
        noise, image, video = random.randbytes(300), random.choice(self.images), random.choice(self.videos)
        encoded = base64.b64encode(noise).decode()
        return [
            random.choice(
                [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
                    {"type": "image_url", "image_url": {"url": image[: len(image) // 2]}},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
                    {"type": "image_url", "image_url": {"url": "gopher://media/picture.png"}},
                    {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
                    {"type": "input_audio", "input_audio": {"data": "no base64!", "format": "wav"}},
                    {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded}"}},
                    {"type": "video_url", "video_url": {"url": video[:400]}},
                ]
            ),
            {"type": "text", "text": "What is it?"},
        ]

    def body(self, content: Any, random: Random, **settings: Any) -> dict[str, Any]:
        sampling = {"temperature": random.choice([0, 0.8]), "max_tokens": random.randint(2, 12), "ignore_eos": True}
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **sampling, **settings}

    async def ask(self, client: httpx.AsyncClient, content: list[dict[str, Any]], salt: str) -> dict[str, Any]:
        """Tokens and log probabilities of a greedy answer. `salt` keeps it from the prefixes that others left."""
        body = self.body(content, Random(0), temperature=0, max_tokens=8, logprobs=True, return_token_ids=True)
        answer = await client.post(self.url, json={**body, "cache_salt": salt}, timeout=SECONDS_OF_A_REQUEST)
        choice = answer.raise_for_status().json()["choices"][0]
        return {
            "tokens": choice["token_ids"],
            "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
        }

    async def send(self, client: httpx.AsyncClient, kind: str, random: Random) -> None:
        """One request of this kind; how it ended is counted."""
        try:
            status: int | str = await self._send(client, kind, random)
        except httpx.HTTPError as error:
            status = f"{type(error).__name__}: {error}"
        self.ends[kind, status] += 1

    async def _send(self, client: httpx.AsyncClient, kind: str, random: Random) -> int | str:
        if kind == "bad JSON":
            wrong = [
                '{"model": ',
                "[1]",
                '{"messages": 5}',
                "[" * 10_000,
                '{"model": "\ud800"}',
                '{"max_tokens": 1e999}',
            ]
            content = random.choice(wrong).encode(errors="surrogatepass")
            header = {"content-type": "application/json"}
            return (await client.post(self.url, content=content, headers=header)).status_code
        if kind == "bad media":
            return (await client.post(self.url, json=self.body(self.bad_content(random), random))).status_code
        if kind == "cut off":
            return await self._leave(client, random)
        body = self.body(self.content(kind, random), random)
        answer = await client.post(self.url, json=body)
        if answer.status_code == 500:
            # A client that left can leave vLLM's two caches of media apart; it then asks for the medium once more with
            # what its log calls a retryable response.
            self.resent += 1
            answer = await client.post(self.url, json=body)
        whole = answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return answer.status_code if whole else "too few tokens"

    async def _leave(self, client: httpx.AsyncClient, random: Random) -> int | str:
        """Start a long stream and go away after some of its lines, or before the first."""
        content = self.content(random.choice(["text", "image", "sound", "video"]), random)
        body = self.body(content, random, stream=True, max_tokens=200)
        lines = random.randint(0, 6)
        if not lines:
            with suppress(httpx.ReadTimeout):
                await client.post(self.url, json=body, timeout=httpx.Timeout(SECONDS_OF_A_REQUEST, read=0.2))
            return "left"
        async with client.stream("POST", self.url, json=body) as answer:
            if answer.status_code != 200:
                return answer.status_code
            async for _ in answer.aiter_lines():
                lines -= 1
                if lines < 0:
                    break
        return "left"


def _video(path: Path, seed: int) -> str:
    write_video(path, seed)
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def kinds(requests: int, seed: int = 0) -> list[str]:
    """The kind of each request: SHARES of them, in an order of chance."""
    drawn = [kind for kind, share in SHARES.items() for _ in range(share)]
    made = [drawn[index % len(drawn)] for index in range(requests)]
    Random(seed).shuffle(made)
    return made


async def ask_all(crowd: Crowd, salt: str) -> list[dict[str, Any]]:
    """Answers to the fixed questions, one after another."""
    async with httpx.AsyncClient(timeout=SECONDS_OF_A_REQUEST) as client:
        return [await crowd.ask(client, content, f"{salt} {index}") for index, content in enumerate(crowd.questions())]


async def soak(crowd: Crowd, root: psutil.Process, requests: int, seconds: float, seed: int = 0) -> Memory:
    """Send so many requests, CONCURRENCY at a time; TimeoutError if they are not answered within so many seconds."""
    memory, before = Memory(), crowd.ends.total()
    waiting: Iterator[tuple[int, str]] = iter(list(enumerate(kinds(requests, seed), seed * requests)))

    async def one_client(client: httpx.AsyncClient) -> None:
        for index, kind in waiting:
            await crowd.send(client, kind, Random(index))

    async def watch() -> None:
        while True:
            memory.sample(root, crowd.ends.total() - before)
            await asyncio.sleep(0.2)

    started = time.monotonic()
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=SECONDS_OF_A_REQUEST, limits=limits) as client:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(one_client(client) for _ in range(CONCURRENCY)))
        watcher.cancel()
    memory.sample(root, crowd.ends.total() - before)
    print(f"{requests} requests in {time.monotonic() - started:.0f} s at concurrency {CONCURRENCY}")
    return memory
