"""The kept parts of calibration's reports."""

import math

import pytest

from benchmarks.accuracy.reporting import calibration, report


def test_rows_of_modalities_are_counted_by_input() -> None:
    rates = {"text": 0.04}
    quiet = {"own": True, "own_error": 0.1, "any_error": 0.2}
    first = {"escape_rate": rates, "modality_rows": {"text": {"own": False}, "audio": quiet}}
    second = {"escape_rate": rates, "modality_rows": {"text": {"own": False}, "audio": {**quiet, "own_error": 0.05}}}
    found = calibration.modality_rows({"q": first, "k": first, "o": second})
    assert found["text"] == {"inputs": 2, "own": 0}
    assert found["audio"] == {"inputs": 2, "own": 2, "error_ratio": pytest.approx(math.sqrt(0.5 * 0.25))}
    methods = {"served": {"calibration": {"modality_rows": found}}, "16bit": {"calibration": None}}
    assert report._modality_rows({"methods": methods})[-1] == "| served | text 0/2, audio 2/2 x0.35 |"
    assert calibration.modality_rows({"q": {"escape_rate": rates}}) == {}
