"""Mutants in processes of their own: one that kills or stops its process is known, and the others go on."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.fuzz.examine import Finding, examine
from tests.fuzz.judge import Judge

# Mutants of one process: leftovers of one mutant in memory do not affect many others.
BATCH = 500
# Seconds after which a mutant counts as one that hangs.
HANGS_AFTER = 30.0


def findings(
    intact: Path, place: Path, seed: int, numbers: Iterable[int], hangs_after: float = HANGS_AFTER
) -> Iterator[Finding]:
    """The outcome of each mutant, in order; its files are in `place` while it is tried."""
    left = list(numbers)
    judge = Judge(intact)
    while left:
        batch = left[:BATCH]
        done = 0
        for finding in _batch(intact, place, judge, seed, batch, hangs_after):
            done += 1
            yield finding
        left = left[done:]


def _batch(
    intact: Path, place: Path, judge: Judge, seed: int, numbers: list[int], hangs_after: float
) -> Iterator[Finding]:
    """The same of one process; ends early after a mutant that ended it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Forked: starting Python and torch anew takes longer than a hundred mutants.
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(sender, intact, place, judge, seed, numbers)
    )
    process.start()
    sender.close()
    try:
        for number in numbers:
            try:
                told = receiver.recv() if receiver.poll(hangs_after) else None
            except EOFError:
                process.join()
                yield _lost(number, "crash", _exit_text(process.exitcode))
                return
            if told is None:
                yield _lost(number, "hang", f"nothing came of it in {hangs_after:.0f} s")
                return
            yield told
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(sender: Connection, intact: Path, place: Path, judge: Judge, seed: int, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    for number in numbers:
        sender.send(examine(intact, place, judge, seed, number))
    sender.close()
    # Skips the parent's exit handlers.
    os._exit(0)


def _lost(number: int, outcome: str, detail: str) -> Finding:
    return Finding(number, "?", "?", ("replay it with --only to see what was done",), False, outcome, detail)


def _exit_text(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
