import pytest

from tests.calibration.built_models import TinyModels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny models of this session."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))
