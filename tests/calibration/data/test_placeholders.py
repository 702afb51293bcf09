"""Placeholder counts and modality rows on hand-made tokens; with a model's processor: test_samples.py."""

from types import SimpleNamespace

import pytest
import torch

from calibration.data.placeholders import check_placeholders, media_tokens
from morphoquant_vllm.errors import MorphoQuantError


def test_placeholder_check_counts_tokens() -> None:
    ids = torch.tensor([[1, 7, 7, 2]])
    check_placeholders("s", ids, {"image": [1, 1]}, {"image": [7]})
    for tokens in ({"image": [1]}, {"image": [3]}, {}):
        with pytest.raises(MorphoQuantError, match="s: placeholders do not match media: 2 image"):
            check_placeholders("s", ids, tokens, {"image": [7]})


def test_audio_tokens_follow_qwens_tower() -> None:
    mask = torch.zeros(3, 300, dtype=torch.int32)
    for row, frames in enumerate((300, 100, 4)):
        mask[row, :frames] = 1
    # 10 ms a frame, 40 ms a token.
    assert media_tokens(None, {"feature_attention_mask": mask}) == {"audio": [75, 25, 1]}


def test_a_processor_with_a_fixed_number_of_tokens_is_counted_by_its_pictures() -> None:
    """Gemma 3's and InternVL's: each picture, or each tile of one, has as many."""
    processor = SimpleNamespace(image_seq_length=4)
    assert media_tokens(processor, {"pixel_values": torch.zeros(3, 3, 28, 28)}) == {"image": [4, 4, 4]}
    assert media_tokens(processor, {"input_ids": torch.zeros(1, 5)}) == {}
