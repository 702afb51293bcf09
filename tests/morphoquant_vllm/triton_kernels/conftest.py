from collections.abc import Iterator

import pytest

from tests.morphoquant_vllm.triton_kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """The process that interprets kernels, started when first asked for."""
    process = Interpreter()
    yield process
    process.close()
