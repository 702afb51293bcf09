"""Code that does not end is ended, in one line, and nothing of the limit is left."""

import signal
import threading
import time

import pytest

from calibration.time_limit import time_limit
from morphoquant_vllm.errors import MorphoQuantError


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        try:
            sum(range(1000))
        except Exception:
            continue


def test_what_does_not_end_is_ended() -> None:
    started = time.process_time()
    with pytest.raises(MorphoQuantError, match="it loops"), time_limit(0.2, "it loops"):
        spin(10)
    assert time.process_time() - started < 2


def test_what_ends_is_left_alone_and_the_timer_is_gone() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with time_limit(0.2, "it loops"):
        spin(0.01)
    spin(0.3)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_time_of_the_clock_does_not_count() -> None:
    with time_limit(0.2, "it loops"):
        time.sleep(0.4)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), time_limit(0.2, "it loops"):
        raise ZeroDivisionError


def test_another_thread_has_no_limit() -> None:
    done: list[bool] = []

    def work() -> None:
        with time_limit(0.05, "it loops"):
            spin(0.2)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
