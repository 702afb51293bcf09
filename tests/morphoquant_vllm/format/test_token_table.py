"""Which row a token id gets, and which tables are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import DEFAULT_ROWS, QuantizationSpec
from morphoquant_vllm.format.token_table import (
    added_token_ids,
    check_token_table,
    row_table,
    rows_of_ids,
    unlisted_media,
)
from morphoquant_vllm.format.verify import verify_checkpoint

LAYERS = {"a": LayerSpec(64, 32, 32, "column", "a")}


def specification(ids: dict[str, tuple[int, ...]], **settings: Any) -> QuantizationSpec:
    return QuantizationSpec(layers=LAYERS, placeholder_token_ids=ids, **settings)


def test_every_id_has_its_row_and_strange_ones_have_any() -> None:
    spec = specification({"image": (7, 9), "audio": (3,)})
    ids = torch.tensor([0, 3, 7, 9, 8, 10, 11, 1000, -1, -7], dtype=torch.int32)
    rows = row_table(spec, 11)[ids.clamp(-1, 11)]
    assert rows.dtype is torch.int32
    names = [spec.rows[row] for row in rows]
    assert names == ["text", "audio", "image", "image", "text", "text", "any", "any", "any", "any"]


def test_rows_follow_the_order_given_and_fall_back_to_any() -> None:
    ids, kinds = torch.tensor([5, 7, 8, 9]), {"image": [7], "video": [8], "audio": [9]}
    assert rows_of_ids(ids, kinds, DEFAULT_ROWS).tolist() == [0, 1, 2, 3]
    assert rows_of_ids(ids, kinds, ("any", "audio", "text")).tolist() == [2, 0, 0, 1]
    assert rows_of_ids(ids, kinds, ("any",)).tolist() == [0] * 4
    with pytest.raises(ValueError):
        rows_of_ids(ids, kinds, ("text",))


def test_text_without_a_row_of_its_own_has_any() -> None:
    spec = specification({"image": (1,)}, rows=("image", "any", "massive"))
    assert row_table(spec, 3).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"smell": (3,)}, "unknown row 'smell'; known: .*'audio', 'any'"),
        ({"massive": (3,)}, "unknown row 'massive'"),
        ({"image": (3,), "video": (3,)}, "token 3 in 'video', but it is in 'image' too"),
        ({"image": (-1,)}, "token -1 in 'image', but it is no token id"),
        ({"image": (2**31,)}, "token 2147483648 in 'image', but it is no token id"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(ids: dict[str, tuple[int, ...]], expected: str) -> None:
    with pytest.raises(MorphoQuantError, match=expected):
        specification(ids)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_token_id": 8}, "has image token 8, but .* does not have it"),
        ({"thinker_config": {"audio_token_index": 7}}, "has audio token 7, but .* has it under 'image'"),
        (
            {"thinker_config": {"image_token_id": 5}, "talker_config": {"image_token_id": 7}},
            "has image token 5, but .* does not have it",
        ),
        ({"image_token_id": 7, "video_token_id": 11}, "has video token 11, but .* does not have it"),
    ],
)
def test_a_table_of_another_model_is_refused(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(MorphoQuantError, match=f"^{tmp_path}: config.json {expected}.*calibrate again"):
        check_token_table(tmp_path, config, specification({"image": (7,)}))


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({"thinker_config": {"image_token_index": 7, "text_config": {"image_token_id": None}}}, {"image": (7,)}),
        # Two media under one token: whichever row it has serves both.
        ({"image_token_id": 7, "video_token_id": 7}, {"image": (7,)}),
        ({"image_token_id": 7}, {"any": (7,)}),
        # Without a table every token is 'any'.
        ({"image_token_id": 7}, {}),
        ({"quantization_config": {"image_token_id": 8}}, {"image": (7,)}),
        # Only the thinker is served: the talker of a Qwen3-Omni has ids of its own.
        (
            {
                "thinker_config": {"image_token_id": 7, "audio_token_id": 9},
                "talker_config": {"image_token_id": 5, "audio_token_id": 7, "text_config": {"video_token_id": 3}},
            },
            {"image": (7,), "audio": (9,)},
        ),
    ],
)
def test_fitting_tables_pass(tmp_path: Path, config: dict[str, Any], ids: dict[str, tuple[int, ...]]) -> None:
    check_token_table(tmp_path, config, specification(ids))


# As published: OpenGVLab's own layout names no token, that of transformers the image's alone.
INTERNVL_CHAT = {"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}, "vision_config": {}}
INTERNVL = {"model_type": "internvl", "image_token_id": 151667, "text_config": {"model_type": "qwen2"}}
QWEN2_5_VL = {"model_type": "qwen2_5_vl", "image_token_id": 151655, "video_token_id": 151656}


@pytest.mark.parametrize(
    ("config", "ids", "untold"),
    [
        (QWEN2_5_VL, {"image": (151655,), "video": (151656,)}, []),
        (QWEN2_5_VL, {"image": (151655,)}, ["video"]),
        (INTERNVL, {"image": (151667,)}, ["video"]),
        (INTERNVL, {"image": (151667,), "video": (151674,)}, []),
        (INTERNVL_CHAT, {"image": (92546,)}, ["video"]),
        (INTERNVL_CHAT, {"any": (92546,)}, ["image", "video"]),
        # Video under the image's token, as its config says.
        ({"image_token_id": 7, "video_token_id": 7}, {"image": (7,)}, []),
        ({"image_token_id": 7, "video_token_id": 8}, {"image": (7,), "video": ()}, ["video"]),
        # The talker's token ids never occur in a prompt.
        (
            {"thinker_config": {"image_token_id": 7}, "talker_config": {"video_token_id": 7}},
            {"image": (7,)},
            ["video"],
        ),
        # As transformers holds it.
        ({**QWEN2_5_VL, "id2label": {0: "LABEL_0"}}, {"image": (151655, 151656)}, []),
    ],
)
def test_media_whose_tokens_the_table_lacks_are_found(
    config: dict[str, Any], ids: dict[str, tuple[int, ...]], untold: list[str]
) -> None:
    assert unlisted_media({"image", "video"}, config, specification(ids)) == untold


def test_internvls_table_is_held_against_config_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 151667, "<img>": 151665}))
    check_token_table(tmp_path, INTERNVL, specification({"image": (151667,)}))
    check_token_table(tmp_path, INTERNVL_CHAT, specification({"image": (151667,)}))
    with pytest.raises(MorphoQuantError, match=r"has image token 151667, but .* does not have it"):
        check_token_table(tmp_path, INTERNVL, specification({"image": (151665,)}))
    with pytest.raises(
        MorphoQuantError, match="token 92546 for image, but the tokenizer does not list it as an added token"
    ):
        check_token_table(tmp_path, INTERNVL_CHAT, specification({"image": (92546,)}))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 7, "content": "<image>"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<image>"}}}),
        ("added_tokens.json", {"<image>": 7}),
    ],
)
def test_a_placeholder_is_an_added_token(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert added_token_ids(tmp_path) == {7}
    check_token_table(tmp_path, {}, specification({"image": (7,)}))
    with pytest.raises(
        MorphoQuantError, match="has token 5 for audio, but the tokenizer does not list it as an added token"
    ):
        check_token_table(tmp_path, {}, specification({"image": (7,), "audio": (5,)}))
    (tmp_path / file).write_text("{")
    with pytest.raises(MorphoQuantError, match=f"{file}: cannot be read as JSON"):
        check_token_table(tmp_path, {}, specification({"image": (7,)}))


def test_verify_refuses_it_too(checkpoint: Path) -> None:
    (checkpoint / "added_tokens.json").write_text(json.dumps({"<image>": 7}))
    with pytest.raises(MorphoQuantError, match="token 8 for audio"):
        verify_checkpoint(checkpoint)
