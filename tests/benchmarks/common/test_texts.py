from benchmarks.common import texts


def test_no_text_is_both_calibrated_and_evaluated_on() -> None:
    assert not set(texts.EVALUATION_MODULES) & set(texts.CALIBRATION_MODULES)
