"""Bound layers with Triton's launcher replaced: what is launched, what kernels rely on, and what a call costs the host.

Kernels are compiled for compute capability 9.0, in the process itself; gpu/tools/no_device.py takes what is launched.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.gpu import bound, bound_kernels, device, launcher, layout, tiles
from morphoquant_vllm.gpu.quantize_launch import WHOLE_TOKENS
from morphoquant_vllm.gpu.tools.no_device import Launched, no_device, noted
from tests.morphoquant_vllm.gpu.cases import Case, layer, tokens

# Of each kind of scales, few tokens and many: enough for splits, for their absence, and for quantizers of both kinds.
UNITS = 4
CASE = Case(300, 200, 640, 64)
CASES = [
    replace(CASE, two_level=two_level, in_order=in_order) for two_level in (False, True) for in_order in (False, True)
]
TOKENS = (1, 2, 16, 17, WHOLE_TOKENS - 1, WHOLE_TOKENS, 300)
# What a call may cost the host, in microseconds: the goal is 40 with the driver. Here without; the machine is shared.
MICROSECONDS = 40
ROUNDS, CALLS = 9, 200
# Functions of Python that a call enters, the op's own included; each launch is one of them.
PYTHON_CALLS = 32


def profile() -> device.Profile:
    """Two tiles of each kind: up to 16 tokens, and more."""
    shipped = tiles.load(tiles.DEFAULT_TABLE)["sm_90"]
    chosen = []
    for two_level in (False, True):
        few, *_, many = shipped.tiles_of(64, two_level)
        chosen += [replace(few, max_tokens=16), many]
    int8 = replace(shipped.int8, min_tokens=None)
    return device.Profile(replace(shipped, tiles=tuple(chosen), int8=int8), UNITS, inline_assembly=True, pdl=True)


@dataclass(frozen=True)
class Made:
    """A bound layer and its inputs."""

    handle: Tensor
    weight: list[Tensor]
    activation: list[Tensor]
    x: Tensor
    modality: Tensor
    bias: Tensor


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from morphoquant_vllm.gpu import selfcheck

    # Nothing is computed here.
    monkeypatch.setattr(selfcheck, "check", lambda *_: None)
    monkeypatch.setattr(device, "profile_of", lambda _: profile())
    with no_device(90):
        yield


def made(case: Case, bias: bool = False) -> Made:
    weight, record = layer(case)
    x, modality = tokens(case, record)
    prepared, activation = backends.BACKENDS["triton"].prepare(weight, record)
    own = torch.zeros(case.out_features, dtype=case.dtype)
    handle = ops.bind(prepared, activation, own if bias else None, case.dtype, "triton")
    return Made(handle, prepared, activation, x, modality, own)


def names(launched: Launched) -> dict[str, Any]:
    """What a launcher was given, by the names of the kernel's arguments; tensors by their address."""
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in launched.arguments]
    return dict(zip(launched.source.fn.arg_names, values, strict=True))


def kernel_of(launched: Launched) -> str:
    return launched.source.fn.__name__


# Allocated in each call; all other addresses are the layer's or the input's.
ALLOCATED = {"codes_ptr", "rows_ptr", "part_ptr", "out_ptr"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bound_layer_launches_what_triton_s_own_launch_does(case: Case) -> None:
    """Kernel by kernel the same binary, grid and arguments, for every M, with silu(gate) * up and a bias or without."""
    it = made(case, bias=True)
    double = torch.cat((it.x, it.x), 1)
    for count in TOKENS:
        for bias in (None, it.bias):
            for x, plain, own in (
                (it.x[:count], ops.linear, ops.bound_linear),
                (double[:count], ops.silu_mul_linear, ops.bound_silu_mul_linear),
            ):
                with noted() as expected:
                    plain(x, it.modality, it.weight, it.activation, bias, "triton")
                with noted() as found:
                    y = own(x, it.modality, it.handle, bias)
                assert [item.source.hash() for item in found] == [item.source.hash() for item in expected]
                assert [item.options for item in found] == [item.options for item in expected]
                assert [item.grid for item in found] == [item.grid for item in expected]
                for one, other in zip(found, expected, strict=True):
                    for name, value in names(other).items():
                        assert name in ALLOCATED or names(one)[name] == value, (kernel_of(one), name)
                check_flow(found, y)


def check_flow(found: list[Launched], y: Tensor) -> None:
    """Each kernel reads what the one before wrote, the last one writes y, and no two tensors overlap."""
    quantizer, product, *reduction = map(names, found)
    assert quantizer["codes_ptr"] == product["codes_ptr"] and quantizer["rows_ptr"] == product["rows_ptr"]
    count, channels, outputs = product["M"], product["K"], product["N"]
    spans = [
        (product["codes_ptr"], count * channels),
        (product["rows_ptr"], 4 * count),
        (y.data_ptr(), y.numel() * y.element_size()),
    ]
    if reduction:
        assert reduction[0]["part_ptr"] == product["out_ptr"] and reduction[0]["out_ptr"] == y.data_ptr()
        assert reduction[0]["rows_ptr"] == product["rows_ptr"]
        spans.append((product["out_ptr"], 4 * product["splits"] * count * outputs))
    else:
        assert product["out_ptr"] == y.data_ptr()
    spans.sort()
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))


def relied_on(launched: Launched) -> dict[str, int]:
    """Arguments of which the compiled kernel believes that they are multiples of 16."""
    arguments = launched.source.fn.arg_names
    found = {}
    for (index,), attributes in launched.source.attrs.items():
        assert attributes in ([], [["tt.divisibility", 16]]), "a property that this test does not know"
        if attributes:
            found[arguments[index]] = names(launched)[arguments[index]]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_kernels_rely_on_holds_at_every_call(case: Case) -> None:
    """Sizes that the kernel was compiled for, and alignment, of inputs at any address and any stride."""
    it = made(case)
    checked = set()
    for count in TOKENS:
        for first in (0, 1, 3, 8):
            for distance in (0, 1, 8, 16):
                store = torch.zeros(count, case.in_features + first + distance, dtype=case.dtype)
                x = store[:, first : first + case.in_features]
                rows = torch.zeros(count + 9, dtype=torch.int32)[first:]
                with noted() as found:
                    ops.bound_linear(x, rows, it.handle, None)
                for item in found:
                    values = relied_on(item)
                    assert not {name: value for name, value in values.items() if value % 16}, kernel_of(item)
                    checked |= {(kernel_of(item), name) for name in values}
                    for (index,), value in item.source.constants.items():
                        assert item.arguments[index] == value, "what was compiled in is what is given"
    many = "quantize_in_order" if case.in_order else "quantize_tokens"
    kernels = ("quantize_activation", many, "int4_gemm", "reduce_splits")
    written = {(kernel, "rows_ptr") for kernel in kernels}
    assert written | {("int4_gemm", "codes_ptr"), ("int4_gemm", "out_ptr"), ("reduce_splits", "part_ptr")} <= checked
    assert ((many, "x_ptr") in checked) == case.in_order


@pytest.mark.parametrize("count", [1, 300])
def test_inputs_that_the_kernels_do_not_fit_go_through_triton_s_own_launch(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = made(CASE)
    seen = []
    real = bound.launch.linear
    monkeypatch.setattr(bound.launch, "linear", lambda *arguments: seen.append(1) or real(*arguments))
    x = it.x[:count]
    others = {
        "half": (x.half(), None),
        "transposed": (torch.zeros(CASE.in_features, count, dtype=CASE.dtype).T, None),
        "another bias": (x, it.bias),
    }
    ops.bound_linear(x, it.modality, it.handle, None)
    # Of one token, its channels lie side by side whatever the stride between tokens.
    assert not seen
    for words, (odd, bias) in others.items():
        seen.clear()
        y = ops.bound_linear(odd, it.modality, it.handle, bias)
        assert y.dtype is odd.dtype and y.shape == (count, CASE.out_features)
        assert bool(seen) == (odd.stride(1) != 1 or words != "transposed"), words
    assert ops.bound_linear(x[:0], it.modality, it.handle, None).shape == (0, CASE.out_features)
    with pytest.raises(ValueError, match=r"the quantizer needs x as \[M, 640\]"):
        ops.bound_linear(x[:, :-32], it.modality, it.handle, None)


def test_a_bound_layer_is_freed_with_its_handle() -> None:
    from morphoquant_vllm import handles

    it = made(CASE)
    address = it.handle.data_ptr()
    assert isinstance(handles.layer_of(it.handle), bound.BoundLayer)
    del it
    assert address not in handles._LAYERS


def test_a_profiler_s_hooks_are_called_as_triton_calls_them() -> None:
    it = made(CASE)
    seen = []
    hook = triton.knobs.runtime.launch_enter_hook
    real = {name: getattr(launcher.knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook")}
    given = []
    note = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    hook.add(note)
    from morphoquant_vllm.gpu.tools import no_device as stand_in

    plain = stand_in.Launcher.__call__

    def call(self: Any, *arguments: Any) -> None:
        given.append(arguments[7:9])
        arguments[7](arguments[6])
        plain(self, *arguments)

    stand_in.Launcher.__call__ = call  # type: ignore[method-assign]
    try:
        ops.bound_linear(it.x[:1], it.modality, it.handle, None)
    finally:
        stand_in.Launcher.__call__ = plain  # type: ignore[method-assign]
        hook.remove(note)
    assert seen == ["quantize_activation", "int4_gemm", "reduce_splits"]
    assert all(pair == (real["launch_enter_hook"], real["launch_exit_hook"]) for pair in given)


class Renamed:
    """A launcher of some other Triton."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, grid: tuple[int, ...], stream: int, function: int, *args: Any) -> None:
        pass


def test_another_form_of_triton_s_launcher_is_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "LEADING", ("gridX", "gridY", "gridZ", "stream", "queue"))
    monkeypatch.setattr(bound.logger, "propagate", True)
    bound._say_that_the_jit_serves.cache_clear()
    it, again = made(CASE), made(CASE)
    assert sum("its slower launch serves" in line for line in caplog.messages) == 1
    with noted() as found:
        ops.bound_linear(it.x[:1], it.modality, it.handle, None)
    assert [kernel_of(item) for item in found] == ["quantize_activation", "int4_gemm", "reduce_splits"]
    assert again.handle is not it.handle


def test_the_known_forms_of_triton_s_launcher() -> None:
    class Kernel:
        function = packed_metadata = launch_metadata = None

        def __init__(self, run: Any) -> None:
            self.run = run

    def of_3_6(gridX, gridY, gridZ, stream, function, *args): ...

    def grown(gridX, gridY, gridZ, stream, function, priority, *args): ...

    assert launcher.has_known_form(Kernel(of_3_6))
    assert not launcher.has_known_form(Kernel(grown))
    assert not launcher.has_known_form(Kernel(Renamed(None, None)))
    assert not launcher.has_known_form(None)


def test_splits_by_tiles_are_those_of_the_table() -> None:
    for tile in tiles.load(tiles.DEFAULT_TABLE)["sm_90"].tiles:
        for out_features, steps, units in ((37888, 56, 132), (3584, 296, 132), (64, 4, 4)):
            found = bound_kernels.splits_by_tiles(tile, out_features, steps, units)
            for count in (1, 2, 7, 16, 17, 100, 1000, 9000):
                expected = tiles.splits_of(tile, count, out_features, steps, units)
                assert found[min(-(-count // tile.block_m), len(found)) - 1] == expected


def test_tiles_of_a_layer_are_those_that_the_table_names() -> None:
    for architecture in tiles.load(tiles.DEFAULT_TABLE).values():
        for group_size, two_level in ((32, False), (64, False), (128, False), (32, True)):
            chosen = architecture.tiles_of(group_size, two_level)
            for count in (1, 2, 4, 5, 8, 16, 17, 32, 33, 64, 65, 128, 129, 512, 5000):
                fitting = [tile for tile in chosen if tile.max_tokens is None or count <= tile.max_tokens]
                assert fitting[0] == architecture.tile(count, group_size, two_level)


def python_calls(call: Any) -> int:
    """Functions of Python that are entered."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found - 1


@pytest.mark.parametrize("count", [1, 2048])
def test_a_call_costs_the_host_little(count: int) -> None:
    """All launches counted, not Triton's launcher and the driver: the median of calls, the least of some medians."""
    case = Case(1, 3584, 3584, 64, two_level=True)
    it = made(case)
    x, modality = torch.zeros(count, case.in_features, dtype=case.dtype), torch.zeros(4096, dtype=torch.int32)

    def call() -> Tensor:
        return ops.bound_linear(x, modality, it.handle, None)

    with torch.inference_mode():
        call()
        assert python_calls(call) <= PYTHON_CALLS
        medians = []
        for _ in range(ROUNDS):
            times = []
            for _ in range(CALLS):
                start = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - start)
            medians.append(statistics.median(times) / 1000)
    assert min(medians) <= MICROSECONDS


def test_layouts_of_scratch_do_not_overlap() -> None:
    for count in (1, 3, 7, 100):
        codes, rows, parts = bound.scratch_sizes(count, 96, 50, 3)
        assert codes >= 96 * count and rows >= 4 * count and parts == 4 * 3 * count * 50
        assert codes % bound_kernels.ALIGNMENT == rows % bound_kernels.ALIGNMENT == 0
    assert layout.UNIT_K % bound_kernels.ALIGNMENT == 0, "the codes of a token begin on 16 bytes"


def test_two_level_scales_are_named_once_for_layers_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bound.logger, "propagate", True)
    bound._say_that_two_level_is_faster.cache_clear()
    with caplog.at_level("INFO", logger=bound.logger.name):
        kept = [made(replace(CASE, two_level=True))]
        assert not caplog.messages
        kept += [made(CASE), made(CASE)]
    (line,) = caplog.messages
    assert "`morphoquant convert`" in line and len(kept) == 3
