"""A limit of processor time for code of a model's publisher."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from morphoquant_vllm.errors import MorphoQuantError


class _Expired(BaseException):
    """Not an Exception: the code that is limited may catch those."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise MorphoQuantError with `message` if the block takes more than `seconds` of the processor's time.

    Time of the processor, not of the clock: a busy or suspended machine is no fault. Python takes signals in its main
    thread alone, so in another thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    before = signal.signal(signal.SIGVTALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _Expired:
        raise MorphoQuantError(message) from None
    finally:
        signal.signal(signal.SIGVTALRM, before)
