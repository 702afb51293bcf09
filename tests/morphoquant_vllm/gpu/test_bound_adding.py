"""Bound layers whose tile adds the parts of a split K itself, with Triton's launcher replaced."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from morphoquant_vllm import handles, ops
from morphoquant_vllm.gpu import adding_launch, device
from morphoquant_vllm.gpu.tools.no_device import Launched, no_device, noted
from tests.morphoquant_vllm.gpu.streams import Streams
from tests.morphoquant_vllm.gpu.test_bound import CASE, Made, kernel_of, made, names, profile, relied_on

FEW = (1, 2, 16)
# Allocated in each call; the counters by Triton's own launch alone.
ALLOCATED = {"codes_ptr", "rows_ptr", "part_ptr", "out_ptr", "counter_ptr"}


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from morphoquant_vllm.gpu import selfcheck

    few = profile()
    adding = tuple(replace(tile, adds_splits=tile.max_tokens == 16) for tile in few.architecture.tiles)
    found = replace(few, architecture=replace(few.architecture, tiles=adding))
    # Nothing is computed here.
    monkeypatch.setattr(selfcheck, "check", lambda *_: None)
    monkeypatch.setattr(device, "profile_of", lambda _: found)
    gc.collect()
    with no_device(90):
        yield


def launched(it: Made, count: int, bias: torch.Tensor | None = None) -> list[Launched]:
    with noted() as found:
        ops.bound_linear(it.x[:count], it.modality, it.handle, bias)
    return found


@pytest.mark.parametrize("two_level", [False, True])
def test_a_bound_layer_launches_what_triton_s_own_launch_does(two_level: bool) -> None:
    it = made(replace(CASE, two_level=two_level), bias=True)
    for count in (*FEW, 17, 300):
        for bias in (None, it.bias):
            with noted() as expected:
                ops.linear(it.x[:count], it.modality, it.weight, it.activation, bias, "triton")
            found = launched(it, count, bias)
            assert ("int4_gemm_adding" in map(kernel_of, found)) == (count in FEW)
            assert "reduce_splits" not in map(kernel_of, found) or count not in FEW
            assert [item.source.hash() for item in found] == [item.source.hash() for item in expected]
            assert [item.options for item in found] == [item.options for item in expected]
            assert [item.grid for item in found] == [item.grid for item in expected]
            for one, other in zip(found, expected, strict=True):
                for name, value in names(other).items():
                    assert name in ALLOCATED or names(one)[name] == value, (kernel_of(one), name)


@pytest.mark.parametrize("two_level", [False, True])
def test_the_product_reads_the_codes_and_writes_sums_and_outputs_apart(two_level: bool) -> None:
    it = made(replace(CASE, two_level=two_level))
    for count in FEW:
        with noted() as found:
            y = ops.bound_linear(it.x[:count], it.modality, it.handle, None)
        quantizer, product = map(names, found)
        assert quantizer["codes_ptr"] == product["codes_ptr"] and quantizer["rows_ptr"] == product["rows_ptr"]
        assert product["out_ptr"] == y.data_ptr()
        end = product["rows_ptr"] + 4 * count
        assert end <= product["part_ptr"] < end + 16, "behind the rows, as the scratch has it"
        assert product["splits"] == found[1].grid[1] >= 2
        assert not {name: value for name, value in relied_on(found[1]).items() if value % 16}


def test_layers_of_a_device_share_counters_for_every_tile_of_the_output() -> None:
    first, second = made(CASE), made(replace(CASE, two_level=True))
    (_, one), (_, other) = launched(first, 1), launched(second, 16)
    product = handles.layer_of(first.handle).products[False][0]
    assert names(one)["counter_ptr"] == product.counters.memory.data_ptr()
    assert product.counters.memory.numel() >= max(one.grid[0], other.grid[0])
    again = made(CASE)
    assert names(launched(again, 1)[1])["counter_ptr"] == names(one)["counter_ptr"]
    assert not bool(product.counters.memory.any())


def test_counters_are_freed_with_the_layers() -> None:
    it = made(CASE)
    assert len(adding_launch._COUNTERS) == 1
    del it
    gc.collect()
    assert not adding_launch._COUNTERS


def test_a_second_stream_is_served_by_two_launches_while_the_first_has_the_counters(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = made(CASE)
    layer = handles.layer_of(it.handle)
    layer.products[False][0].counters.turn.device = torch.device("cuda", 0)
    streams.busy = {7}
    served = {}
    for stream in (7, 8):
        monkeypatch.setattr(layer, "stream", lambda stream=stream: stream)
        served[stream] = [kernel_of(item) for item in launched(it, 1)]
    assert served[7] == ["quantize_activation", "int4_gemm_adding"]
    assert served[8] == ["quantize_activation", "int4_gemm", "reduce_splits"]


def test_no_counters_are_made_for_tiles_that_do_not_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "profile_of", lambda _: profile())
    it = made(CASE)
    assert not adding_launch._COUNTERS
    assert [kernel_of(item) for item in launched(it, 1)] == ["quantize_activation", "int4_gemm", "reduce_splits"]
