import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(directory)
    return directory


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))
