"""The time of our linear with each instruction set that the processor has: a process each, called in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.cpu_linear.measure import interleaved, timed
from morphoquant_vllm import environment
from morphoquant_vllm.cpu.build import cpu_flags, instruction_sets
from morphoquant_vllm.errors import MorphoQuantError


def measure(
    threads: int, outputs: int, channels: int, group_size: int, tokens: tuple[int, ...], seconds: float
) -> list[dict[str, Any]]:
    """One entry for each of `tokens`, with the times (s) of a two-level layer by instruction set."""
    shape = {"outputs": outputs, "channels": channels, "group_size": group_size, "threads": threads}
    found = []
    with ExitStack() as stack:
        layer = (outputs, channels, group_size)
        names = instruction_sets(cpu_flags())
        ways = {name: stack.enter_context(_worker(name, threads, layer)) for name in names}
        for count in tokens:
            times = interleaved({name: partial(way, count) for name, way in ways.items()}, seconds, clock=_as_told)
            found.append(shape | {"tokens": count, "pairs": times["avx2"]["runs"], "times": times})
            line = ", ".join(f"{name} {time['median'] * 1e6:.0f} µs" for name, time in times.items())
            print(f"instruction sets M={count} threads={threads}: {line}", flush=True)
    return found


def _as_told(run: Callable[[], Any]) -> float:
    """The seconds that a worker took for its call, without the way there and back."""
    return float(run())


@contextmanager
def _worker(instructions: str, threads: int, layer: tuple[int, int, int]) -> Iterator[Callable[[int], float]]:
    """A process with the kernels of one instruction set: the seconds of one call on M tokens."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, instructions, threads, layer), daemon=True)
    # Threads that spin after their call would slow down the next one.
    environment.wait_passively()
    process.start()
    there.close()

    def call(tokens: int) -> float:
        try:
            here.send(tokens)
            return float(here.recv())
        except (EOFError, OSError) as error:
            raise MorphoQuantError(f"the process with the {instructions} kernels ended; its output says why") from error

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, instructions: str, threads: int, layer: tuple[int, int, int]) -> None:
    """Answer each number of tokens with the seconds of a call, until the other end closes."""
    os.environ[environment.CPU.name] = instructions
    from benchmarks.cpu_linear.ways.peers import ours

    torch.set_num_threads(threads)
    ways: dict[int, Callable[[], Any]] = {}
    while True:
        try:
            tokens = connection.recv()
        except EOFError:
            return
        if tokens not in ways:
            ways[tokens] = partial(ours(*layer, tokens, True), torch.randn(tokens, layer[1]).bfloat16())
            ways[tokens]()
        connection.send(timed(ways[tokens]))
