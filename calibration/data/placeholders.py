"""Placeholder tokens stand for media: counts them and compares them with the media."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from calibration.data.conversations import BadConversationError, Conversation, Text
from morphoquant_vllm.errors import MorphoQuantError

# Frames of a sound for each token of Qwen2.5's audio towers: a convolution of stride 2, then pooling by 2.
_FRAMES_PER_TOKEN = 4
# Qwen3-Omni's tower: three convolutions of stride 2, on chunks of 100 frames, which have 13 tokens each.
_QWEN3_OMNI = "Qwen3OmniMoeProcessor"
_CHUNK_FRAMES, _CHUNK_TOKENS = 100, 13


def check_text(conversation: Conversation, tokenizer: Any, placeholder_token_ids: Mapping[str, Sequence[int]]) -> None:
    """Refuse a conversation whose text contains a placeholder token: the model would take it for media."""
    ids = [(kind, index) for kind, each in placeholder_token_ids.items() for index in each]
    tokens = tokenizer.convert_ids_to_tokens([index for _, index in ids])
    for (kind, index), token in zip(ids, tokens, strict=True):
        if token is None:
            raise MorphoQuantError(
                f"the tokenizer has no token {index}, config.json's placeholder of {kind}; take the files of the "
                "tokenizer from the model's own directory"
            )
    texts = [part.text for message in conversation.messages for part in message.parts if isinstance(part, Text)]
    for token in tokens:
        if any(token in text for text in texts):
            raise BadConversationError(
                f"{conversation.source}: placeholders do not match media: the text itself holds {token}; "
                "remove it, since media parts add their placeholders themselves"
            )


def media_tokens(processor: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The number of tokens of each medium, by modality."""
    tokens = {}
    if "image_grid_thw" in inputs:
        tokens["image"] = (inputs["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    if "video_grid_thw" in inputs:
        tokens["video"] = (inputs["video_grid_thw"].prod(-1) // processor.video_processor.merge_size**2).tolist()
    if "image" not in tokens and "pixel_values" in inputs and hasattr(processor, "image_seq_length"):
        # Gemma 3 and InternVL: as many for each picture, or for each tile that a picture is cut into.
        tokens["image"] = [processor.image_seq_length] * inputs["pixel_values"].shape[0]
    if "image" not in tokens and "image_sizes" in inputs and hasattr(processor, "spatial_merge_size"):
        # Pixtral's processor, which Mistral 3 has: one for each square of patches.
        side = processor.patch_size * processor.spatial_merge_size
        tokens["image"] = (inputs["image_sizes"] // side).prod(-1).tolist()
    if "feature_attention_mask" in inputs:
        frames = inputs["feature_attention_mask"].sum(-1)
        if type(processor).__name__ == _QWEN3_OMNI:
            rest = _halved(_halved(_halved(frames % _CHUNK_FRAMES)))
            tokens["audio"] = (rest + frames // _CHUNK_FRAMES * _CHUNK_TOKENS).tolist()
        else:
            tokens["audio"] = (_halved(frames) // 2).tolist()
    return tokens


def frames_per_token(processor: Any) -> int:
    """Frames of a sound for each of its tokens, rounded up."""
    if type(processor).__name__ == _QWEN3_OMNI:
        return -(-_CHUNK_FRAMES // _CHUNK_TOKENS)
    return _FRAMES_PER_TOKEN


def _halved(count: torch.Tensor) -> torch.Tensor:
    """What a convolution of stride 2 leaves of a number of frames."""
    return (count - 1) // 2 + 1


def check_placeholders(
    source: str,
    input_ids: torch.Tensor,
    media_tokens: Mapping[str, list[int]],
    placeholder_token_ids: Mapping[str, Sequence[int]],
) -> None:
    """Refuse input ids [1, M] whose placeholders differ from `media_tokens`, the tokens of each medium by modality."""
    for kind, ids in placeholder_token_ids.items():
        count = int(torch.isin(input_ids, torch.tensor(ids)).sum())
        expected = media_tokens.get(kind, [])
        if min(expected, default=1) < 1:
            raise BadConversationError(f"{source}: one {kind} part is too short for a token; use a longer one")
        if count != sum(expected):
            raise BadConversationError(
                f"{source}: placeholders do not match media: {count} {kind} placeholder tokens, but {len(expected)} "
                f"{kind} parts of {sum(expected)} tokens; check the text and the model's chat template"
            )
