"""The words of a forecast."""

from dataclasses import replace

from calibration.forecast import Forecast

FORECAST = Forecast(14, 2, 3, {"text": 40, "image": 8}, 48, 2 * 10**9, 3 * 10**9, 10**9, 5 * 10**8)


def test_the_lines_have_every_figure() -> None:
    text = "\n".join(FORECAST.lines())
    for words in ("14 linears in 2 blocks, on 3 samples", "text 40, image 8", "2.00 GB of 3.00", "1.00 GB", "0.50 GB"):
        assert words in text
    assert "read from disk" not in text


def test_too_little_memory_is_said() -> None:
    assert "read from disk" in "\n".join(replace(FORECAST, memory=4 * 10**9).lines())
