import pytest

from benchmarks.accuracy.language import MODELS
from benchmarks.accuracy.settings import CALIBRATION_WINDOWS, WINDOWS, parse_calibration
from benchmarks.common import texts
from morphoquant_vllm.errors import MorphoQuantError


def test_every_calibration_text_has_windows_by_default() -> None:
    assert set(CALIBRATION_WINDOWS) == set(WINDOWS) == set(MODELS)
    for benchmark, model in MODELS.items():
        assert set(CALIBRATION_WINDOWS[benchmark]) == set(model().calibration)
        assert sum(CALIBRATION_WINDOWS[benchmark].values()) == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope=1", "unknown calibration domain 'nope'"),
        ("numpy", "not domain=windows"),
        ("numpy=0", "all counts of windows are 0"),
    ],
)
def test_calibration_setting(given: str, message: str) -> None:
    assert parse_calibration("numpy=2,report=3", texts.CALIBRATION) == {"numpy": 2, "report": 3}
    with pytest.raises(MorphoQuantError, match=message):
        parse_calibration(given, texts.CALIBRATION)
