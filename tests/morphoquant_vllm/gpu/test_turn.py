"""Whose turn it is among streams, without a GPU."""

import torch

from morphoquant_vllm.gpu.turn import Turn
from tests.morphoquant_vllm.gpu.streams import Streams


def test_a_stream_takes_its_turn_when_the_one_before_is_idle(streams: Streams) -> None:
    turn = Turn(torch.device("cuda", 0))
    streams.busy = {7, 8}
    assert turn.serves(7) and turn.serves(7)
    assert not turn.serves(8), "the first stream still works"
    streams.busy = {8}
    assert turn.serves(8) and not turn.serves(7)


def test_a_captured_call_takes_no_turn(streams: Streams) -> None:
    turn = Turn(torch.device("cuda", 0))
    streams.busy = {7}
    assert turn.serves(7)
    streams.capturing = True
    assert turn.serves(9), "captured, not run"
    streams.capturing = False
    assert turn.serves(7) and not turn.serves(9)


def test_a_cpu_has_one_stream() -> None:
    turn = Turn(torch.device("cpu"))
    assert turn.serves(1) and turn.serves(2)
