from typing import Any

import pytest

from calibration.model.architectures import ARCHITECTURES, find_architecture
from morphoquant_vllm.errors import MorphoQuantError


def test_known_types_are_found_by_name() -> None:
    for architecture in ARCHITECTURES:
        assert find_architecture({"model_type": architecture.model_type}) is architecture


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: qwen2_5_omni, .*qwen3"),
        ({}, "None is not supported"),
        ({"model_type": "internvl"}, "'internvl' is not supported; supported: .*qwen2_5_vl"),
        ({"model_type": "internvl_chat"}, "'internvl_chat' is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is not supported; supported: .*qwen3_moe"),
    ],
)
def test_others_are_refused_by_name(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(MorphoQuantError, match=expected):
        find_architecture(config)


def test_placeholders_come_from_either_spelling() -> None:
    omni = find_architecture({"model_type": "qwen2_5_omni"})
    config = {"thinker_config": {"image_token_index": 1, "video_token_id": 2, "audio_token_index": 3}}
    assert omni.placeholder_token_ids(config) == {"image": (1,), "video": (2,), "audio": (3,)}
    with pytest.raises(MorphoQuantError, match="no image_token_id"):
        omni.placeholder_token_ids({"thinker_config": {}})
    assert find_architecture({"model_type": "llama"}).placeholder_token_ids({}) == {}


def test_the_decoder_config_of_qwen2_5_vl_may_be_flat_or_nested() -> None:
    architecture = find_architecture({"model_type": "qwen2_5_vl"})
    flat = {"num_hidden_layers": 3, "num_attention_heads": 2}
    assert architecture.decoder_config(flat)["num_hidden_layers"] == 3
    nested = flat | {"text_config": {"num_hidden_layers": 4, "num_attention_heads": 2}}
    assert architecture.decoder_config(nested)["num_hidden_layers"] == 4
    with pytest.raises(MorphoQuantError, match="no num_hidden_layers"):
        architecture.decoder_config({})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers = None is not a positive integer"),
        ({"num_attention_heads": "8"}, "num_attention_heads = '8' is not a positive"),
        ({"num_attention_heads": True}, "num_attention_heads = True is not a positive"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 is not a positive"),
    ],
)
def test_counts_of_the_decoder_are_checked(change: dict[str, Any], expected: str) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": None}
    llama = find_architecture({"model_type": "llama"})
    assert llama.decoder_config(config) == config
    with pytest.raises(MorphoQuantError, match=f"config.json: {expected}"):
        llama.decoder_config(config | change)
    del config["num_attention_heads"]
    with pytest.raises(MorphoQuantError, match=r"config\.json: no num_attention_heads"):
        llama.decoder_config(config)
