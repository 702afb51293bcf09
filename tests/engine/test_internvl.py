"""InternVL served: its config names the image token alone, and vLLM gives videos another.

Its decoder may be of any class, such as Cohere's, which passes its embedding no quantization config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.rows import ENGINE, kinds_and_rows, run_jobs, spec_rows
from tests.tiny_conversations import image_bytes
from tests.tiny_internvl import IMAGE, write_internvl

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("internvl") / "checkpoint")


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two engines that take pictures, and one that takes videos too."""
    directory = tmp_path_factory.mktemp("media")
    (directory / "picture.png").write_bytes(image_bytes(3))
    media = {"image": [str(directory / "picture.png")]}
    prompts = [{"prompt": "Two rivers meet."}, {"prompt": f"{IMAGE}What can you see?", "media": media}]
    # The settings of ENGINE are those of Qwen's processors.
    engine = {**ENGINE, "mm_processor_kwargs": None}
    cohere = write_internvl(directory / "cohere", "cohere")
    jobs = {
        name: {
            "model": str(model),
            "engine": {**engine, "limit_mm_per_prompt": {"image": 1, "video": videos}},
            "passes": {"fresh": {"prompts": prompts}},
        }
        for name, model, videos in (
            ("pictures", checkpoint, 0),
            ("embedding without a config", cohere, 0),
            ("videos too", checkpoint, 1),
        )
    }
    return run_jobs(directory, jobs)


@pytest.mark.parametrize("engine", ["pictures", "embedding without a config"])
def test_pictures_take_their_row_where_videos_are_switched_off(
    recorded: dict[str, Any], checkpoint: Path, engine: str
) -> None:
    steps = kinds_and_rows(recorded[engine]["fresh"], spec_rows(checkpoint))
    assert {kind for kinds, _ in steps for kind in kinds} == {"text", "image"}
    for kinds, rows in steps:
        assert rows == kinds


def test_every_token_takes_any_where_a_video_would_pass_for_text(recorded: dict[str, Any], checkpoint: Path) -> None:
    steps = kinds_and_rows(recorded["videos too"]["fresh"], spec_rows(checkpoint))
    assert {row for _, rows in steps for row in rows} == {"any"}
    lines = [line.split("MorphoQuant: ")[1] for line in recorded["log"].splitlines() if "MorphoQuant: " in line]
    assert lines[-1] == (
        "row 'any' quantizes the tokens of every modality (the token table does not list the tokens of video)"
    )
