import io

import pytest
from rich.console import Console

from calibration.blocks.loop import BlockResult, LayerBegins
from calibration.progress import BlockProgress


def show(terminal: bool) -> str:
    stream = io.StringIO()
    with BlockProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        progress(BlockResult(0, 2, {}, 0.25))
        progress(BlockResult(1, 2, {}, None))
    return stream.getvalue()


def test_without_a_terminal_each_block_is_a_line() -> None:
    first, second = show(terminal=False).splitlines()
    assert first.startswith("block 1/2  loss 0.2500  about ")
    assert second == "block 2/2  loss -  about 0 s left"


def test_a_run_that_goes_on_counts_its_own_blocks_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 10.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with BlockProgress(Console(file=stream, force_terminal=False, width=100)) as progress:
        progress(BlockResult(7, 10, {}, 0.25))
    assert stream.getvalue() == "block 8/10  loss 0.2500  about 20 s left\n"


def test_on_a_terminal_there_is_a_bar_with_block_and_loss() -> None:
    shown = show(terminal=True)
    assert "block 2/2" in shown
    assert "loss" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_names_the_layer_that_is_worked_on(terminal: bool) -> None:
    stream = io.StringIO()
    with BlockProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        progress(BlockResult(0, 2, {}, 0.25))
        progress.begin(LayerBegins(1, 2, "layers.1.mlp.down_proj"))
    shown = stream.getvalue()
    assert ("layers.1.mlp.down_proj" in shown) == terminal
    assert "block 1/2" in shown, "the block is not finished"
    assert "loss 0.2500" in shown
