"""The int8 path of bound layers, with Triton's launcher replaced; and the workspace that the layers share."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import backends, environment, ops
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import device, int8_path, layout, tiles, workspace
from morphoquant_vllm.gpu.int8_path import AddressDescriptor
from morphoquant_vllm.gpu.tools.no_device import Launched, no_device, noted
from morphoquant_vllm.gpu.workspace import Workspace, workspace_of
from tests.morphoquant_vllm.gpu.cases import Case, layer, tokens
from tests.morphoquant_vllm.gpu.streams import Streams
from tests.morphoquant_vllm.gpu.test_bound import kernel_of, names, profile, relied_on

FROM = 200
CASE = Case(300, 200, 640, 64, two_level=True)
HERE = torch.device("cpu")


@pytest.fixture(autouse=True, params=[True, False], ids=["descriptors", "pointers"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    from morphoquant_vllm.gpu import selfcheck

    few = profile()
    int8 = replace(few.architecture.int8, min_tokens=FROM, descriptors=request.param)
    found = replace(few, architecture=replace(few.architecture, int8=int8))
    # Nothing is computed here.
    monkeypatch.setattr(selfcheck, "check", lambda *_: None)
    monkeypatch.setattr(device, "profile_of", lambda _: found)
    gc.collect()
    with no_device(90):
        yield request.param


def bound(case: Case, bias: Tensor | None = None) -> tuple[Tensor, layout.GpuWeight]:
    weight, record = layer(case)
    prepared, activation = backends.BACKENDS["triton"].prepare(weight, record)
    return ops.bind(prepared, activation, bias, case.dtype, "triton"), layout.GpuWeight(*prepared)


def launched(handle: Tensor, case: Case, count: int, bias: Tensor | None = None) -> tuple[list[Launched], Tensor]:
    x, modality = tokens(replace(case, tokens=count), layer(case)[1])
    with noted() as found:
        y = ops.bound_linear(x, modality, handle, bias)
    return found, y


def address_of(value: int | AddressDescriptor) -> int:
    return value.data_ptr() if isinstance(value, AddressDescriptor) else value


def test_many_tokens_are_served_by_three_launches_that_follow_each_other(descriptors: bool) -> None:
    own = torch.zeros(CASE.out_features, dtype=CASE.dtype)
    handle, weight = bound(CASE, own)
    shared = workspace_of(HERE)
    for bias in (None, own):
        found, y = launched(handle, CASE, 300, bias)
        assert [kernel_of(item) for item in found] == ["quantize_tokens", "unpack_int8", "int8_gemm"]
        quantizer, unpack, product = map(names, found)
        assert unpack["out_ptr"] == address_of(product["weights"]) == shared.address == shared.memory.data_ptr()
        assert unpack["weight_ptr"] == weight.codes.data_ptr() and unpack["level_ptr"] == weight.scale.data_ptr()
        assert address_of(product["codes"]) == quantizer["codes_ptr"]
        assert product["rows_ptr"] == quantizer["rows_ptr"] and product["out_ptr"] == y.data_ptr()
        assert product["HAS_BIAS"] == (bias is not None)
        if descriptors:
            assert product["codes"].shape == (300, 640) and product["codes"].strides == (640, 1)
            assert product["weights"].shape == int8_path.workspace_shape(weight)
        for item in found:
            sizes = {name: value for name, value in relied_on(item).items() if isinstance(value, int)}
            assert not {name: value for name, value in sizes.items() if value % 16}


def test_what_is_launched_is_what_the_plain_path_launches(descriptors: bool) -> None:
    handle, weight = bound(CASE)
    found, _ = launched(handle, CASE, 300)
    codes, rows = torch.zeros(300, 640, dtype=torch.int8), torch.zeros(300, dtype=torch.int32)
    memory, gain = workspace_of(HERE).memory, torch.ones(6)
    tile = device.profile_of(HERE).architecture.int8
    with noted() as plain:
        int8_path.unpack(weight, memory, inline_assembly=True, pdl=True)
        common = {"weight": weight, "workspace": memory, "gain": gain, "bias": None, "dtype": CASE.dtype, "tile": tile}
        int8_path.int8_matmul(codes=codes, rows=rows, pdl=True, **common)
    assert [item.source.hash() for item in found[1:]] == [item.source.hash() for item in plain]
    assert [item.grid for item in found[1:]] == [item.grid for item in plain]
    for one, other in zip(found[1:], plain, strict=True):
        for name, value in names(other).items():
            if name in ("codes", "weights") and descriptors:
                given = names(one)[name]
                # What Triton's launcher reads of a descriptor.
                assert (tuple(given.shape), tuple(given.strides)) == (tuple(value.shape), tuple(value.strides))
                assert (given.padding, given.round_f32_to_tf32) == (value.padding, value.round_f32_to_tf32)
            elif name not in ("codes", "rows_ptr", "out_ptr", "gain_ptr", "bias_ptr"):
                assert names(one)[name] == value, (kernel_of(one), name)


def test_a_fused_tile_needs_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    few = device.profile_of(HERE)
    sizes = {"block_n": 128, "block_m": 128, "block_k": 128, "warps": 8, "stages": 3}
    int8 = replace(few.architecture.int8, fused=True, descriptors=False, **sizes)
    int8.check("test")
    fused = replace(few, architecture=replace(few.architecture, int8=int8))
    monkeypatch.setattr(device, "profile_of", lambda _: fused)
    monkeypatch.setenv(environment.WORKSPACE.name, "0")
    handle, weight = bound(CASE)
    found, y = launched(handle, CASE, 300)
    assert [kernel_of(item) for item in found] == ["quantize_tokens", "fused_int8"]
    quantizer, product = map(names, found)
    assert product["codes_ptr"] == quantizer["codes_ptr"] and product["rows_ptr"] == quantizer["rows_ptr"]
    assert product["weight_ptr"] == weight.codes.data_ptr() and product["out_ptr"] == y.data_ptr()
    assert product["M"] == 300 and HERE not in workspace._WORKSPACES


def test_few_tokens_and_group_scales_do_without() -> None:
    for case, count in ((CASE, FROM - 1), (replace(CASE, two_level=False), 300)):
        handle, _ = bound(case)
        assert "int8_gemm" not in [kernel_of(item) for item in launched(handle, case, count)[0]]
        del handle


def test_the_setting_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WORKSPACE.name, "0")
    handle, _ = bound(CASE)
    assert "int8_gemm" not in [kernel_of(item) for item in launched(handle, CASE, 300)[0]]
    assert HERE not in workspace._WORKSPACES


def test_layers_share_one_workspace_of_the_largest_s_size_and_follow_it() -> None:
    larger = replace(CASE, out_features=500)
    handles = [bound(case) for case in (CASE, larger, CASE)]
    memory = workspace_of(HERE).memory
    assert memory.numel() == 512 * 640
    for (handle, _), case in zip(handles, (CASE, larger, CASE), strict=True):
        found, _ = launched(handle, case, 300)
        _, unpack, product = map(names, found)
        assert unpack["out_ptr"] == address_of(product["weights"]) == memory.data_ptr()
    del handles, handle
    assert HERE not in workspace._WORKSPACES, "it is freed with the last layer"


def test_what_does_not_fit_is_refused_with_its_size_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def empty(size: object, **settings: object) -> Tensor:
        if isinstance(size, int) and size:
            raise torch.OutOfMemoryError
        return real(size, **settings)

    shared = Workspace(HERE)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(
        MorphoQuantError, match=r"workspace of 129\.5 MiB does not fit .* of cpu; set MORPHOQUANT_WORKSPACE=0"
    ):
        shared.grow(37888 * 3584)


def on_gpu() -> Workspace:
    shared = Workspace(HERE)
    shared.grow(64)
    shared.device = shared.turn.device = torch.device("cuda", 0)
    return shared


def test_one_stream_has_the_workspace_at_a_time(streams: Streams) -> None:
    shared = on_gpu()
    streams.busy = {7, 8}
    assert shared.serves(7) and shared.serves(7)
    assert not shared.serves(8), "the first stream still works"
    streams.busy = {8}
    assert shared.serves(8) and not shared.serves(7)


def test_memory_that_a_graph_has_seen_is_kept(streams: Streams) -> None:
    shared = on_gpu()
    assert shared.serves(7)
    streams.busy, streams.capturing = {7}, True
    assert shared.serves(9), "captured, not run"
    address = shared.address
    shared.device = HERE
    shared.grow(1 << 20)
    assert [memory.data_ptr() for memory in shared.seen_by_graphs] == [address]
    shared.grow(1 << 21)
    assert len(shared.seen_by_graphs) == 1, "no graph has seen the second"


def test_the_size_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.logger, "propagate", True)
    with caplog.at_level("INFO", logger=workspace.logger.name):
        shared = Workspace(HERE)
        shared.grow(3 << 20)
        shared.grow(1 << 20)
    (line,) = caplog.messages
    assert "takes 3.0 MiB on cpu" in line and "MORPHOQUANT_WORKSPACE=0" in line


def test_every_shipped_tile_of_the_path_fits_the_workspace() -> None:
    for architecture in tiles.load(tiles.DEFAULT_TABLE).values():
        assert layout.TILE_N % architecture.int8.block_n == 0
        assert 4 * layout.UNIT_K % architecture.int8.block_k == 0
