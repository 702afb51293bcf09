"""One generated tiny model for all tests of this folder."""

from pathlib import Path

import pytest

from benchmarks.calibrate.model.generate import generate


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate("tiny", tmp_path_factory.mktemp("generated") / "model")
