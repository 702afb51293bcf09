from collections.abc import Iterator

import pytest
import torch

from tests.morphoquant_vllm.gpu.interpreter import Interpreter
from tests.morphoquant_vllm.gpu.streams import Streams


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """The process that interprets kernels, started when first asked for."""
    process = Interpreter()
    yield process
    process.close()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Streams that are busy, or captured, as the test says."""
    found = Streams()
    monkeypatch.setattr(torch.cuda, "ExternalStream", found.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found
