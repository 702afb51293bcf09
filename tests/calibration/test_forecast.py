"""The words of a forecast."""

from dataclasses import replace

import pytest

from calibration.forecast import Forecast, duration

FORECAST = Forecast(14, 2, 3, {"text": 40, "image": 8}, 48, 2 * 10**9, 10**9, 3 * 10**9, 10**9, 5 * 10**8, 5904.0)


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
    assert "read from disk" in "\n".join(replace(FORECAST, memory=4 * 10**9).lines())
    much_too_little = "\n".join(replace(FORECAST, memory=4 * 10**9, least_memory=4 * 10**9).lines())
    assert "more than there is: lower --sample-tokens" in much_too_little and "read from disk" not in much_too_little


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
