"""Magnitudes by modality, values of an FP8 cache, and the attention that takes them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.kv_scales.__main__ import divergence
from benchmarks.kv_scales.scales import LARGEST, Magnitudes, changed_attention, rounding, to_fp8
from benchmarks.models.tiny_omni.config import omni_config
from tests.tiny_models import AUDIO, DECODER, VISION

TEXT, IMAGE = 0, 1
IMAGE_TOKEN = 7


def test_an_fp8_cache_keeps_what_it_can_hold_and_clips_the_rest() -> None:
    x = torch.tensor([1.0, -1.5, 448.0, 1000.0, 1.05])
    assert to_fp8(x, torch.tensor(1.0)).tolist() == [1.0, -1.5, 448.0, LARGEST, 1.0]
    assert to_fp8(x, torch.tensor(4.0))[3] == 1024.0


def test_magnitudes_are_the_largest_of_each_modality_over_all_passes() -> None:
    magnitudes = Magnitudes()
    tokens = torch.tensor([[TEXT, IMAGE, TEXT]])
    for factor in (1.0, 0.5):
        x = factor * torch.tensor([[[[1.0], [-4.0], [-2.0]]]])
        assert magnitudes(0, "key", x, tokens) is x
    assert magnitudes.found[0, "key"].tolist() == [2.0, 4.0, 0.0, 0.0]


def test_scales_by_modality_help_only_if_one_modality_is_far_smaller() -> None:
    tokens = torch.tensor([[TEXT, IMAGE]])

    def error(smaller: float, by_modality: bool) -> float:
        x = torch.randn(1, 1, 2, 256, generator=torch.Generator().manual_seed(0))
        x[:, :, 1] *= smaller
        magnitudes = Magnitudes()
        magnitudes(0, "key", x, tokens)
        rounded = rounding(magnitudes.found, by_modality)(0, "key", x, tokens)
        return float((rounded - x)[:, :, 1].norm() / x[:, :, 1].norm())

    assert error(0.1, False) == pytest.approx(error(0.1, True), rel=0.1)
    assert error(1e-5, False) > 3 * error(1e-5, True)


def test_attention_takes_the_changed_keys_of_each_layer_until_the_end() -> None:
    ids = {
        "audio": 4, "image": IMAGE_TOKEN, "video": 6, "audio_bos": 1, "audio_eos": 2, "vision_bos": 8,
        "vision_eos": 9, "user": 3, "end": 5, "im_end": 5, "im_start": 10, "first_free": 20,
    }  # fmt: skip
    config = omni_config(ids, DECODER, VISION, AUDIO).thinker_config
    with torch.random.fork_rng():
        thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    tokens = torch.tensor([[30, 31, 32, 33]])
    seen: list[tuple[int, str, list[int]]] = []

    def double(layer: int, part: str, tensor: Tensor, modality: Tensor) -> Tensor:
        seen.append((layer, part, modality.flatten().tolist()))
        return 2 * tensor

    def ask() -> Any:
        with torch.no_grad():
            return thinker(input_ids=tokens).logits

    plain, function = ask(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with changed_attention(thinker, {31: IMAGE}, double):
        assert not torch.allclose(ask(), plain)
    assert seen == [(layer, part, [TEXT, IMAGE, TEXT, TEXT]) for layer in range(2) for part in ("key", "value")]
    assert torch.equal(ask(), plain) and ALL_ATTENTION_FUNCTIONS["sdpa"] is function


def test_equal_answers_do_not_diverge_and_others_do() -> None:
    one = [torch.tensor([[0.7, 0.3]]).log()]
    assert divergence(one, one) == {"divergence": 0.0, "other tokens": 0.0}
    other = divergence(one, [torch.tensor([[0.3, 0.7]]).log()])
    assert other["divergence"] == pytest.approx(0.4 * torch.tensor(7 / 3).log().item())
    assert other["other tokens"] == 1.0
