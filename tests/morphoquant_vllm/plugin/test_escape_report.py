"""Rates of counts and of calibration's report, the line of the log, and the warning."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.plugin.escape_report import (
    JUDGED_TOKENS,
    Drift,
    RowCounts,
    calibrated_rates,
    counts_by_row,
    read_report,
    summary,
)

NAMES = ("text", "image", "any", "massive")
TOO_LARGE = {"layers": {"a": {"escape_rate": {"text": 10**400}}}}


def test_counts_of_layers_become_rows() -> None:
    # tokens, escapes, massive tokens, their escapes
    counts = torch.tensor(
        [
            [[10, 30, 1, 20], [4, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            [[10, 50, 2, 30], [4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        ]
    )
    rows = counts_by_row(counts, torch.tensor([64, 128]), NAMES)
    assert rows == {
        "text": RowCounts(tokens=10, inputs=20, massive_inputs=3, codes=1920, escapes=80),
        "image": RowCounts(tokens=4, inputs=8, massive_inputs=0, codes=768, escapes=8),
        "massive": RowCounts(tokens=2, inputs=3, massive_inputs=3, codes=320, escapes=50),
    }
    assert rows["text"].escape_rate == 80 / 1920
    assert rows["text"].massive_share == 3 / 20
    assert summary(rows, {"text": 0.0401}) == (
        "text 4.17%, calibrated 4.01% (10 tokens, 15.00% massive); image 1.04% (4 tokens, 0.00% massive); "
        "massive 15.62% (2 tokens)"
    )


def test_calibrated_rates_weigh_layers_by_their_channels() -> None:
    report = {
        "layers": {
            "a": {"escape_rate": {"text": 0.02, "image": 0.01, "all": 0.03}},
            "b": {"escape_rate": {"text": 0.05, "all": 0.06}},
            "c": {"escape_rate": {"text": 1.0}},
        }
    }
    rates = calibrated_rates(report, {"a": 64, "b": 128})
    assert rates == {"text": pytest.approx(0.04), "any": pytest.approx(0.05)}


def test_the_input_of_a_list_of_experts_has_calibrated_rates() -> None:
    experts = {"list": {"input": {"escape_rate": {"text": 0.05}}, "tokens": [3]}}
    report = {"layers": {"a": {"escape_rate": {"text": 0.02}}}, "experts": experts}
    assert calibrated_rates(report, {"a": 64, "list": 128}) == {"text": pytest.approx(0.04)}


@pytest.mark.parametrize(
    "report", [None, {}, {"layers": {"a": {}}}, {"layers": {"a": {"escape_rate": 3}}}, [], TOO_LARGE]
)
def test_a_report_without_rates_gives_none(report: object) -> None:
    assert calibrated_rates(report, {"a": 64}) == {}


def test_a_report_that_cannot_be_read_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert read_report(str(tmp_path), None) is None
    file = tmp_path / "morphoquant_calibration.json"
    for text in ("{", "[" * 100_000, "[]", '{"a": NaN}'):
        file.write_text(text)
        assert read_report(str(tmp_path), None) is None
    file.unlink()
    os.mkfifo(file)
    assert read_report(str(tmp_path), None) is None
    file.unlink()
    # pytest may listen to the logger as well as to the root.
    lines = list(dict.fromkeys(caplog.messages))
    assert all(line.endswith("(escape rates are not compared with calibration)") for line in lines)
    problems = (
        "no such file",
        "cannot be read",
        "is nested too deep",
        "does not hold",
        "NaN is not JSON",
        "not a regular",
    )
    assert len(lines) == len(problems)
    assert all(problem in line for problem, line in zip(problems, lines, strict=True))
    file.write_text(json.dumps({"layers": {}}))
    assert read_report(str(tmp_path), None) == {"layers": {}}


def served(tokens: int, rate: float) -> RowCounts:
    return RowCounts(tokens=tokens, inputs=tokens, codes=1000 * tokens, escapes=round(1000 * tokens * rate))


def test_a_row_far_above_calibration_is_warned_of_once_after_enough_tokens() -> None:
    drift = Drift({"text": 0.04, "image": 0.04, "massive": 0.1, "audio": 0.0})
    few = {"text": served(JUDGED_TOKENS - 1, 0.5), "massive": served(9 * JUDGED_TOKENS, 0.9)}
    assert drift.warnings(few) == []
    rows = {"text": served(JUDGED_TOKENS, 0.1), "image": served(JUDGED_TOKENS, 0.08), "audio": served(9999, 0.5)}
    assert drift.warnings(rows) == [
        f"10.00% of the codes of text tokens escape, 2.5 times the calibrated 4.00%, on {JUDGED_TOKENS} counted "
        "tokens; if this traffic stays, calibrate with samples of it"
    ]
    assert drift.warnings({"text": served(9 * JUDGED_TOKENS, 0.9)}) == []


def test_new_traffic_is_judged_apart_from_old() -> None:
    drift = Drift({"text": 0.04})
    old = served(50 * JUDGED_TOKENS, 0.04)
    assert drift.warnings({"text": old}) == []
    new = served(JUDGED_TOKENS, 0.2)
    total = RowCounts(
        tokens=old.tokens + new.tokens,
        inputs=old.inputs + new.inputs,
        codes=old.codes + new.codes,
        escapes=old.escapes + new.escapes,
    )
    assert total.escape_rate < 0.05
    assert len(drift.warnings({"text": total})) == 1
