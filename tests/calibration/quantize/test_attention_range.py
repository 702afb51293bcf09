"""The watch sees what a cache stores, in the whole calibration and beside it."""

from pathlib import Path

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from calibration.processes import ONE
from calibration.quantize.attention_range import AttentionWatch
from morphoquant_vllm.format.kv_cache import AttentionRange
from tests import tiny_models


def test_keys_are_seen_after_rotary_as_a_cache_stores_them(tmp_path: Path) -> None:
    source = tiny_models.build_tiny_llama(tmp_path / "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad(), AttentionWatch() as watch:
        cache = model(torch.arange(5, 60)[None], use_cache=True).past_key_values
    found = watch.range(ONE)
    assert found is not None and found.query > 0
    assert found.key == max(float(layer.keys.abs().max()) for layer in cache.layers)
    assert found.value == max(float(layer.values.abs().max()) for layer in cache.layers)


def test_the_largest_of_several_calls_is_kept_whatever_the_form_of_the_call() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    with AttentionWatch() as watch:
        scaled_dot_product_attention(query, key=-9 * key, value=value)
        scaled_dot_product_attention(query=query, key=key, value=value)
    largest = (float(tensor.abs().max()) for tensor in (query, 9 * key, value))
    assert watch.range(ONE) == AttentionRange(*largest)


def test_a_block_without_attention_has_no_range() -> None:
    with AttentionWatch() as watch:
        torch.nn.functional.softmax(torch.ones(3), 0)
    assert watch.range(ONE) is None


def test_the_ranges_of_all_processes_count() -> None:
    class Two:
        def all_gather(self, value: list[float]) -> list[list[float]]:
            return [value, [1.0, 0.5, 7.0]]

    watch = AttentionWatch()
    watch.largest = torch.tensor([2.0, 3.0, 4.0])
    assert watch.range(Two()) == AttentionRange(2.0, 3.0, 7.0)
