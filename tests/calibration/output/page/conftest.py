from pathlib import Path

import pytest

from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from tests.calibration.built_models import TinyModels


@pytest.fixture(scope="session")
def omni_directory(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny omni model, its name full of characters that HTML must escape."""
    directory = tmp_path_factory.mktemp("page") / "a <b>&amp; b"
    calibrate(tiny.model("omni"), tiny.data("omni"), directory, recipe=Recipe(device="cpu"))
    return directory
