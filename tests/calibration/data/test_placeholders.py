"""Placeholder counts and modality rows on hand-made tokens; with a model's processor: test_samples.py."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_omni_moe import processing_qwen3_omni_moe

from calibration.data.conversations import Conversation, Message, Text
from calibration.data.placeholders import check_placeholders, check_text, frames_per_token, media_tokens
from morphoquant_vllm.errors import MorphoQuantError


def test_placeholder_check_counts_tokens() -> None:
    ids = torch.tensor([[1, 7, 7, 2]])
    check_placeholders("s", ids, {"image": [1, 1]}, {"image": [7]})
    for tokens in ({"image": [1]}, {"image": [3]}, {}):
        with pytest.raises(MorphoQuantError, match="s: placeholders do not match media: 2 image"):
            check_placeholders("s", ids, tokens, {"image": [7]})


def test_a_tokenizer_without_a_placeholder_is_refused() -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["<a>" if index < 9 else None for index in ids])
    spoken = Conversation("s", (Message("user", (Text("x"),)),))
    check_text(spoken, tokenizer, {"image": [7], "audio": [8]})
    with pytest.raises(MorphoQuantError, match=r"tokenizer has no token 11, config\.json's placeholder of audio; take"):
        check_text(spoken, tokenizer, {"image": [7], "audio": [8, 11]})


def test_audio_tokens_follow_qwens_tower() -> None:
    mask = torch.zeros(3, 300, dtype=torch.int32)
    for row, frames in enumerate((300, 100, 4)):
        mask[row, :frames] = 1
    # 10 ms a frame, 40 ms a token.
    assert media_tokens(None, {"feature_attention_mask": mask}) == {"audio": [75, 25, 1]}


@pytest.mark.parametrize("frames", [1, 2, 8, 9, 99, 100, 101, 107, 300, 3000])
def test_audio_tokens_of_qwen3_omni_are_those_of_its_processor(frames: int) -> None:
    processor = type("Qwen3OmniMoeProcessor", (), {})()
    mask = torch.ones(1, frames, dtype=torch.int32)
    expected = processing_qwen3_omni_moe._get_feat_extract_output_lengths(mask.sum(-1))
    assert media_tokens(processor, {"feature_attention_mask": mask}) == {"audio": expected.tolist()}
    assert frames <= int(expected) * frames_per_token(processor)


def test_a_processor_with_a_fixed_number_of_tokens_is_counted_by_its_pictures() -> None:
    """Gemma 3's and InternVL's: each picture, or each tile of one, has as many."""
    processor = SimpleNamespace(image_seq_length=4)
    assert media_tokens(processor, {"pixel_values": torch.zeros(3, 3, 28, 28)}) == {"image": [4, 4, 4]}
    assert media_tokens(processor, {"input_ids": torch.zeros(1, 5)}) == {}


def test_pixtrals_pictures_have_a_token_for_each_square_of_patches() -> None:
    processor = SimpleNamespace(patch_size=14, spatial_merge_size=2)
    sizes = torch.tensor([[56, 112], [28, 28]])
    assert media_tokens(processor, {"pixel_values": torch.zeros(2), "image_sizes": sizes}) == {"image": [8, 1]}
    # LLaVA-NeXT's, whose tokens depend on more than the size.
    assert media_tokens(SimpleNamespace(patch_size=14), {"image_sizes": sizes}) == {}
