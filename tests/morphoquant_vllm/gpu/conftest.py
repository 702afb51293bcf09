from collections.abc import Iterator

import pytest

from tests.morphoquant_vllm.gpu.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """The process that interprets kernels, started when first asked for."""
    process = Interpreter()
    yield process
    process.close()
