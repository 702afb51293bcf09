"""Tables of a mixture of experts."""

from benchmarks.accuracy.reporting import experts, report


def row(difference: float, low: float | None, high: float | None) -> dict:
    return {"accuracy": 0.9, "difference": difference, "difference_interval": [low, high]}


METHODS = {
    "16bit": {"kinds": {"image": row(0, 0, 0)}, "expert-errors": {"a": {"tokens": [8, 2], "error": [0.0, 0.0]}}},
    "w4a4-token": {
        "kinds": {"image": row(-0.05, -0.08, -0.02)},
        "expert-errors": {
            "a": {"tokens": [6, 4], "error": [0.1, 0.3]},
            "b": {"tokens": [10, 0], "error": [0.2, None]},
        },
    },
    "served": {"kinds": {"image": row(0.01, None, None)}},
}


def test_differences_from_16_bit_stand_with_their_intervals() -> None:
    header, rows = experts.intervals({"benchmark": "moe-omni", "methods": METHODS})
    assert header == ["method", "image"]
    assert rows[1] == ["w4a4-token", "-5.0 (-8.0 to -2.0)"]
    # One question has no interval.
    assert rows[2] == ["served", "+1.0 (+nan to +nan)"]
    assert experts.intervals({"benchmark": "omni", "methods": METHODS}) == ([], [])


def test_errors_of_experts_are_those_of_experts_with_tokens() -> None:
    header, rows = experts.table({"methods": METHODS})
    assert rows == [["w4a4-token", "3 of 4", "20.00", "30.00", "0.0%"]]
    assert len(header) == len(rows[0])


def test_both_tables_stand_in_the_page() -> None:
    page = "\n".join(report._experts({"benchmark": "moe-omni", "methods": METHODS}))
    assert "| w4a4-token | -5.0 (-8.0 to -2.0) |" in page and "| w4a4-token | 3 of 4 |" in page
    assert report._experts({"benchmark": "language", "methods": {}}) == []
