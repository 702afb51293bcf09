"""The command line."""

from pathlib import Path

import pytest

from benchmarks.paper.options import parse

WANTED = ("--model", "/models/Qwen2.5-Omni-3B/", "--data", "/data")


def test_the_output_is_named_for_the_model_and_benchmarks_keep_the_tables_order() -> None:
    options = parse([*WANTED, "--benchmarks", "air-bench", "mmmu", "mmmu"], None)
    assert options.output == Path("paper-Qwen2.5-Omni-3B")
    assert options.benchmarks == ["mmmu", "air-bench"]
    assert options.hold_out and options.scienceqa == "all" and not options.without_16_bit


def test_words_for_other_commands_are_split_as_a_shell_does() -> None:
    options = parse([*WANTED, "--serve-arguments", "--a '{\"b\": 1}' -c"], None)
    assert options.serve_arguments == ["--a", '{"b": 1}', "-c"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--server", "http://x"), "is not NAME=URL"),
        (("--server", "a/b=http://x"), "is not NAME=URL"),
        (("--server", "a=http://x", "--server", "a=http://y"), "two rows have the same name"),
        (("--serve-arguments", "'a"), "close its quotes"),
        (("--scienceqa", "none"), "invalid choice"),
    ],
)
def test_what_is_wrong_is_said(more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([*WANTED, *more], None)
    assert stop.value.code == 2 and message in capsys.readouterr().err
