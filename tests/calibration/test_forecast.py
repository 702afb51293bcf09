"""The words of a forecast."""

from dataclasses import replace

import pytest

from calibration.blocks.memory_need import MemoryNeed
from calibration.forecast import Forecast, duration

# Bytes at the peaks of the phases.
NEED = MemoryNeed(front=2 * 10**9, front_streamed=10**9, block=10**9)
FORECAST = Forecast(14, 2, 3, {"text": 40, "image": 8}, 48, NEED, 3 * 10**9, 10**9, 5 * 10**8, 5904.0)


def test_the_lines_have_every_figure() -> None:
    text = "\n".join(FORECAST.lines())
    for words in (
        "14 linears in 2 blocks, on 3 samples",
        "text 40, image 8",
        "2.00 GB of 3.00",
        "1.00 GB",
        "0.50 GB",
        "98 min",
    ):
        assert words in text
    assert "read from disk" not in text


def test_too_little_memory_is_said() -> None:
    assert "read from disk" in "\n".join(replace(FORECAST, memory=replace(NEED, front=4 * 10**9)).lines())


@pytest.mark.parametrize(
    ("need", "remedy"),
    [
        (replace(NEED, block=4 * 10**9), "a smaller --sample-tokens"),
        (replace(NEED, front=4 * 10**9, front_streamed=4 * 10**9), "--dtype bfloat16"),
    ],
)
def test_a_need_that_streaming_does_not_meet_is_said_with_what_helps(need: MemoryNeed, remedy: str) -> None:
    text = "\n".join(replace(FORECAST, memory=need).lines())
    assert f"for lack of memory: calibrate with {remedy}" in text and "read from disk" not in text


def test_no_estimate_is_made_up() -> None:
    assert FORECAST.lines()[:-1] == replace(FORECAST, seconds=None).lines()[:-1]
    assert replace(FORECAST, seconds=None).lines()[-1] == "time: the line of each block has an estimate of the rest"


def test_learning_is_said_if_there_is_any() -> None:
    text = "\n".join(replace(FORECAST, learning_seconds=300).lines())
    assert "about 98 min for the blocks and 5 min for learning, a rough" in text and "learning may take more" in text
    assert "learning" not in "\n".join(FORECAST.lines())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (125, "2.1 min"), (7100, "120 min"), (7300, "2 h")]
)
def test_times_have_two_figures(seconds: float, text: str) -> None:
    assert duration(seconds) == text
