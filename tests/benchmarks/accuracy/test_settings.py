import pytest

from benchmarks.accuracy.settings import CALIBRATION_WINDOWS, parse_calibration
from benchmarks.common import texts
from morphoquant_vllm.errors import MorphoQuantError


def test_every_calibration_text_has_windows_by_default() -> None:
    assert set(CALIBRATION_WINDOWS) == set(texts.CALIBRATION)
    assert sum(CALIBRATION_WINDOWS.values()) == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope=1", "unknown calibration domain 'nope'"),
        ("numpy", "not domain=windows"),
        ("numpy=0", "all counts of windows are 0"),
    ],
)
def test_calibration_setting(given: str, message: str) -> None:
    assert parse_calibration("numpy=2,report=3") == {"numpy": 2, "report": 3}
    with pytest.raises(MorphoQuantError, match=message):
        parse_calibration(given)
