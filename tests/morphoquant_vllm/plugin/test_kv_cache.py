"""Scales of an FP8 cache: from calibrated magnitudes, and only if the user asks for such a cache."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention import Attention

from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.numerics.limits import MAX_MAGNITUDE
from morphoquant_vllm.plugin import kv_cache

FOUND = AttentionRange(query=1.0, key=896.0, value=0.0)


def attention(cache: str) -> torch.nn.Module:
    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.kv_cache_dtype = cache
    return layer


@pytest.mark.parametrize(("cache", "given"), [("auto", False), ("fp8_e5m2", False), ("fp8", True), ("fp8_e4m3", True)])
def test_only_a_cache_of_e4m3_takes_scales(cache: str, given: bool) -> None:
    found = kv_cache.cache_method(
        SimpleNamespace(), attention(cache), "model.layers.1.self_attn.attn", {"model": FOUND}
    )
    assert (found is not None) == given


def test_a_block_takes_its_own_magnitudes() -> None:
    ranges = {f"model.layers.{block}": AttentionRange(1.0, block, 1.0) for block in (1, 10)}
    for block in (1, 10):
        prefix = f"model.layers.{block}.self_attn.attn"
        method = kv_cache.cache_method(SimpleNamespace(), attention("fp8"), prefix, ranges)
        assert method is not None and method.found.key == block
    assert kv_cache.cache_method(SimpleNamespace(), attention("fp8"), "model.layers.2.attn", ranges) is None
    assert kv_cache.cache_method(SimpleNamespace(), torch.nn.Linear(1, 1), "model.layers.1.mlp", ranges) is None


@pytest.mark.parametrize("magnitude", [0, 5e-324, 1e-38, 1e-30, 1.0, MAX_MAGNITUDE])
def test_a_cache_can_divide_by_every_scale(magnitude: float) -> None:
    """By 0 it would hold NaN, and by infinity zeros."""
    AttentionRange(1.0, magnitude, 1.0).check("model.layers.0")
    scale = torch.tensor(kv_cache.scale(magnitude), dtype=torch.float32)
    assert bool(scale > 0) and bool(torch.isfinite(1 / scale))


def test_the_layer_gets_scales_that_leave_room_above_the_magnitudes() -> None:
    layer = attention("fp8")
    for name in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
        layer.register_buffer(name, torch.tensor(1.0))
    layer._k_scale_cpu, layer._v_scale_cpu = torch.tensor(1.0), torch.tensor(1.0)
    method = kv_cache.CalibratedCacheMethod(SimpleNamespace(), FOUND)
    method.create_weights(layer)
    assert not list(layer.parameters())
    for _ in range(2):  # weights may be loaded again
        method.process_weights_after_loading(layer)
        assert (layer._k_scale_float, layer._v_scale_float) == (4.0, 1.0)
        assert float(layer._k_scale) == 4.0 and layer._q_scale_float == pytest.approx(2 / 448)
        assert not list(layer.parameters())
