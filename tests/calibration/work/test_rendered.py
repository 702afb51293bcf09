"""Rendered samples on disk."""

from pathlib import Path

import pytest
import torch

from calibration.work.rendered import StoredInputs, drop_rendered, media_bytes, store_media, stored_bytes
from morphoquant_vllm.errors import MorphoQuantError

TEXT = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5, dtype=torch.bool)}
# A slice is not contiguous, and two names of one tensor share memory.
PIXELS = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))[:, ::2]
MEDIA = {**TEXT, "pixel_values": PIXELS, "again": PIXELS, "second_per_grid_ts": torch.tensor([0.5])}


def test_text_stays_in_memory(tmp_path: Path) -> None:
    assert store_media(tmp_path, 0, TEXT) is TEXT
    assert not list(tmp_path.iterdir()) and stored_bytes(tmp_path) == 0 == media_bytes(TEXT)


def test_media_come_back_as_they_were(tmp_path: Path) -> None:
    stored = store_media(tmp_path, 3, MEDIA)
    assert isinstance(stored, StoredInputs) and list(stored) == list(MEDIA) and len(stored) == len(MEDIA)
    for name, value in MEDIA.items():
        assert torch.equal(stored[name], value) and stored[name].dtype == value.dtype
    assert media_bytes(MEDIA) == 2 * PIXELS.nbytes + 4
    assert media_bytes(MEDIA) < stored_bytes(tmp_path) < media_bytes(MEDIA) + 1000


def test_names_are_known_without_reading(tmp_path: Path) -> None:
    stored = store_media(tmp_path, 0, MEDIA)
    drop_rendered(tmp_path)
    assert not list(tmp_path.iterdir())
    assert "pixel_values" in stored and "input_features" not in stored
    with pytest.raises(KeyError):
        stored["input_features"]
    with pytest.raises(MorphoQuantError, match=r"rendered-00000\.safetensors: cannot be used"):
        stored["pixel_values"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match=r"cannot be written .*; make room, or choose another --work$"):
        store_media(tmp_path / "missing", 0, MEDIA)
