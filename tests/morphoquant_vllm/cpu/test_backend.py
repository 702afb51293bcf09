"""The CPU kernels against the torch reference."""

import os
import subprocess
import sys

import pytest
import torch

from morphoquant_vllm import ops
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import build as cpu_build
from morphoquant_vllm.cpu import layout
from morphoquant_vllm.cpu.build import Kernels
from morphoquant_vllm.cpu.layout import HEADER_BYTES
from morphoquant_vllm.numerics import activation, linear
from morphoquant_vllm.numerics.limits import GROUP_SIZES
from morphoquant_vllm.numerics.weights import integer_codes, pack, unpack
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries
from tests.morphoquant_vllm.cpu.cases import (
    ROWS,
    SCHEMES,
    SHAPES,
    case,
    compare,
    compare_in_order,
    compare_many,
    compare_shape,
    tokens_of,
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_codes_are_equal_and_outputs_within_the_bound(library: Kernels, threads: int, shape: tuple) -> None:
    compare_shape(*shape, library)


def test_many_tokens_and_many_channels(library: Kernels, threads: int) -> None:
    compare_many(library)


def test_channels_that_come_in_order(library: Kernels, threads: int) -> None:
    compare_in_order(library)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sums_are_exact_at_the_extremes(library: Kernels, group_size: int, bits: int) -> None:
    """Scale 1 on one group and 0 on the others: the float32 output is the integer sum itself."""
    channels, outputs = 2 * group_size, 20
    weight, record = case(outputs, channels, group_size, "group" if bits == 4 else "eight_bit")
    q = integer_codes(weight.codes)
    highest, lowest = (7, 8) if bits == 4 else (127, 128)
    q[0], q[1] = highest, -lowest
    record = record._replace(
        mask=torch.ones_like(record.mask),
        gain=torch.ones(ROWS),
        inverse=torch.ones(ROWS, channels),
        centre=torch.zeros(ROWS, channels),
        massive_low=torch.full((2, 3), 1e31),
    )
    x = tokens_of(9, channels, torch.float32)[0]
    x[0], x[1] = 1e9, -1e9
    modality = torch.zeros(9, dtype=torch.int32)
    codes = activation.act_quant(x, modality, record)
    for group in range(2):
        scale = torch.zeros(outputs, 2).bfloat16()
        scale[:, group] = 1
        single = linear.weight_record(pack(q) if bits == 4 else q, scale, torch.zeros(1, ROWS, outputs))
        packed, prepared = cpu.prepare(single, record)
        y = cpu.linear(x, modality, packed, prepared, None, library)
        expected = linear.group_sums(codes, single)[:, :, group]
        assert torch.equal(y, expected.float())
        assert int(expected[1, 1]) == 128 * lowest * group_size and int(expected[1, 0]) == -128 * highest * group_size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_gets_the_same_output_in_every_batch(library: Kernels, threads: int, scheme: str) -> None:
    """To the last bit: the order of additions depends on K and G alone, and with levels all are of integers."""
    weight, record = case(70, 1152, 64, scheme)
    x, modality = tokens_of(30, 1152, torch.float32)
    packed, prepared = cpu.prepare(weight, record)
    together = cpu.linear(x, modality, packed, prepared, None, library)
    for first, last in ((0, 1), (1, 3), (3, 7), (7, 13), (13, 30)):
        part = cpu.linear(x[first:last], modality[first:last], packed, prepared, None, library)
        assert torch.equal(part, together[first:last])


def test_strided_inputs(library: Kernels) -> None:
    weight, record = case(48, 96, 32)
    x, modality = tokens_of(7, 192, torch.bfloat16)
    compare(weight, record, x[:, 96:], modality, None, library)
    transposed = x[:, :96].T.contiguous().T
    assert transposed.stride(1) != 1
    compare(weight, record, transposed, modality, None, library)


def test_a_row_that_does_not_exist_is_refused_and_a_massive_token_needs_none(library: Kernels) -> None:
    weight, record = case(48, 96, 32)
    packed, prepared = cpu.prepare(weight, record)
    x = tokens_of(2, 96, torch.float32)[0].nan_to_num(0)
    for row in (ROWS, -1, 2**31 - 1):
        modality = torch.tensor([0, row], dtype=torch.int32)
        ordinary = torch.zeros_like(x)
        with pytest.raises(IndexError, match="modality names a row"):
            cpu.linear(ordinary, modality, packed, prepared, None, library)
        with pytest.raises(IndexError, match="modality names a row"):
            cpu.act_quant(ordinary, modality, prepared, library)
        massive = torch.full_like(x, 5.0)
        expected = activation.act_quant(massive, torch.full((2,), ROWS - 1, dtype=torch.int32), record)
        assert torch.equal(cpu.act_quant(massive, modality, prepared, library), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_repacked_weights_are_no_larger_than_the_canonical_ones(scheme: str) -> None:
    weight, record = case(64, 1024, 64, scheme)
    packed, _ = cpu.prepare(weight, record)
    size = sum(part.numel() * part.element_size() for part in packed)
    # With levels, the start value of each output's sums: an int32.
    own = HEADER_BYTES + (4 * 64 if scheme == "two_level" else 0)
    assert size == sum(part.numel() * part.element_size() for part in weight) + own
    assert not any(part.data_ptr() == weight.codes.data_ptr() for part in packed)
    codes = packed[0][HEADER_BYTES:][: weight.codes.numel()]
    if scheme == "eight_bit":
        assert torch.equal(torch.bincount(codes), torch.bincount(weight.codes.flatten().int() + 128))
        return
    nibbles = torch.cat((codes & 15, codes >> 4))
    assert torch.equal(torch.bincount(nibbles), torch.bincount(unpack(weight.codes).flatten() + 8))


def test_eight_bit_weights_with_levels_are_not_prepared() -> None:
    wide, record = case(48, 96, 32, "eight_bit")
    levels = case(48, 96, 32, "two_level")[0]
    with pytest.raises(ValueError, match="8-bit weights must have group scales"):
        cpu.prepare(levels._replace(codes=wide.codes), record)


def _records(outputs: int = 48, channels: int = 96) -> tuple[list, list]:
    return cpu.prepare(*case(outputs, channels, 32))


def _changed(index: int, value) -> tuple[list, list]:
    """Records with one tensor changed: the weight's block, absorbed_bias, the activation's block."""
    packed, prepared = _records()
    parts = packed + prepared
    parts[index] = value(parts[index])
    return parts[:2], parts[2:]


@pytest.mark.parametrize(
    ("weight", "record"),
    [
        pytest.param(*_changed(0, lambda t: t.view(torch.int8)), id="block int8"),
        pytest.param(*_changed(0, lambda t: t.view(-1, 64)), id="block 2-D"),
        pytest.param(*_changed(0, lambda t: torch.stack((t, t), 1)[:, 0]), id="block strided"),
        pytest.param(*_changed(0, lambda t: t[:63]), id="no header"),
        pytest.param(*_changed(1, lambda t: t.double()), id="absorbed_bias float64"),
        pytest.param(*_changed(1, lambda t: t[0]), id="absorbed_bias 1-D"),
        pytest.param(*_changed(1, lambda t: t.T.contiguous().T), id="absorbed_bias strided"),
        pytest.param(*_changed(1, lambda t: t.to("meta")), id="absorbed_bias elsewhere"),
        pytest.param(*_changed(2, lambda t: t.to("meta")), id="activation elsewhere"),
        pytest.param(*_changed(2, lambda t: t[:32]), id="no activation header"),
        pytest.param(list(case(48, 96, 32)[0]), list(case(48, 96, 32)[1]), id="canonical"),
        pytest.param([], [], id="empty"),
    ],
)
def test_wrong_records_raise_before_native_code_runs(weight: list, record: list) -> None:
    x, modality = tokens_of(3, 96, torch.float32)
    with pytest.raises(ValueError, match=r"must|needs"):
        cpu.linear(x, modality, weight, record, None, UNCALLABLE)


def _header(block: torch.Tensor, place: int, value: int) -> torch.Tensor:
    block[:HEADER_BYTES].view(torch.int64)[place] = value
    return block


@pytest.mark.parametrize(
    ("weight", "record"),
    [
        pytest.param(_records()[0], _records(channels=128)[1], id="activation of another K"),
        pytest.param([_records(channels=128)[0][0], _records()[0][1]], _records()[1], id="weights of another K"),
        pytest.param([_records(outputs=64)[0][0], _records()[0][1]], _records()[1], id="weights of another N"),
        pytest.param([_records()[1][0], _records()[0][1]], [_records()[0][0]], id="blocks exchanged"),
        pytest.param(*_changed(0, lambda t: t[:-64]), id="weights cut"),
        pytest.param(*_changed(0, lambda t: _header(t[:-64], 1, t.numel() - 64)), id="weights cut, header too"),
        pytest.param(*_changed(0, lambda t: _header(t, 0, 7)), id="no magic number"),
        pytest.param(*_changed(0, lambda t: _header(t, 6, 8)), id="said to be of 8 bits"),
        pytest.param(*_changed(0, lambda t: _header(t, 6, 5)), id="of 5 bits"),
        pytest.param(*_changed(0, lambda t: _header(t, 4, 48)), id="group of 48"),
        pytest.param(*_changed(0, lambda t: _header(t, 4, 0)), id="group of 0"),
        pytest.param(*_changed(1, lambda t: t[:2]), id="rows of absorbed_bias missing"),
        pytest.param(*_changed(1, lambda t: t[:, :32].contiguous()), id="outputs of absorbed_bias missing"),
        pytest.param(*_changed(2, lambda t: t[:-64]), id="activation cut"),
        pytest.param(*_changed(2, lambda t: _header(t, 3, 5)), id="another number of rows"),
        pytest.param(*_changed(2, lambda t: _header(t, 3, 0)), id="no rows"),
        pytest.param(*_changed(2, lambda t: _header(t, 5, 1 << 40)), id="huge intervals"),
        pytest.param(*_changed(2, lambda t: _header(t, 6, 1)), id="said to be in order"),
        pytest.param(*_changed(2, lambda t: _header(t, 4, -1)), id="negative sets"),
    ],
)
def test_records_that_do_not_fit_raise_before_they_are_read(library: Kernels, weight: list, record: list) -> None:
    x, modality = tokens_of(3, 96, torch.float32)
    with pytest.raises(ValueError, match=r"the records must come from cpu\.layout\.prepare"):
        cpu.linear(x, modality, weight, record, None, library)


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, 192, 256])
def test_the_native_code_takes_the_group_sizes_of_the_format(
    library: Kernels, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ has a list of its own; here each size reaches it."""
    monkeypatch.setattr(layout, "GROUP_SIZES", (group_size,))
    packed, prepared = cpu.prepare(*case(48, 768, group_size))
    x, modality = tokens_of(3, 768, torch.float32)
    if group_size in GROUP_SIZES:
        cpu.linear(x, modality, packed, prepared, None, library)
        return
    with pytest.raises(ValueError, match="the records must come from"):
        cpu.linear(x, modality, packed, prepared, None, library)


@pytest.mark.parametrize(
    "field", ["inverse", "centre", "mask", "gain", "channel_order", "massive_channel", "massive_low", "massive_high"]
)
@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:1], lambda t: t[..., None]])
def test_canonical_records_of_wrong_dtypes_or_shapes_are_not_prepared(field: str, change) -> None:
    weight, record = case(48, 96, 32)
    with pytest.raises(ValueError, match=r"the CPU kernels do not take these records"):
        cpu.prepare(weight, record._replace(**{field: change(getattr(record, field))}))


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(3, 96, dtype=torch.float64), None),
        (torch.zeros(3, 96, dtype=torch.int8), None),
        (torch.zeros(3, 96, device="meta"), None),
        (torch.zeros(3, 96), torch.zeros(47)),
        (torch.zeros(3, 96), torch.zeros(48, dtype=torch.float64)),
        (torch.zeros(3, 96), torch.zeros(48, 1)),
    ],
)
def test_wrong_inputs_raise_before_native_code_runs(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    packed, prepared = cpu.prepare(*case(48, 96, 32))
    with pytest.raises(ValueError, match=r"must|needs"):
        cpu.linear(x, torch.zeros(3, dtype=torch.int32), packed, prepared, bias, UNCALLABLE)


def _native_code(call: bytes) -> int:
    raise AssertionError("native code was called")


UNCALLABLE = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none")


@pytest.mark.parametrize("field", ["channel_order", "massive_channel"])
@pytest.mark.parametrize("channel", [-1, 96])
def test_channels_outside_the_input_are_refused_when_records_are_prepared(field: str, channel: int) -> None:
    weight, record = case(48, 96, 32)
    index = getattr(record, field).clone()
    index.view(-1)[0] = channel
    with pytest.raises(ValueError, match=f"{field} names a channel outside"):
        cpu.prepare(weight, record._replace(**{field: index}))


def test_the_op_is_well_formed_and_compiles() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    packed, prepared = cpu.prepare(*case(48, 96, 32))
    x, modality = tokens_of(6, 96, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.act_quant.default, (x, modality, prepared, "cpu"), test_utils=checks)
    torch.library.opcheck(ops.linear.default, (x, modality, packed, prepared, None, "cpu"), test_utils=checks)
    compiled = torch.compile(
        lambda x: ops.linear(x, modality, packed, prepared, None, "cpu") + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), ops.linear(x, modality, packed, prepared, None, "cpu") + 1)


@pytest.mark.full
@pytest.mark.parametrize("instructions", sorted(cpu_build.INSTRUCTION_SETS))
def test_no_case_reads_or_writes_out_of_bounds(instructions: str) -> None:
    """Under AddressSanitizer, whose runtime has to be in the process before Python."""
    cpu_libraries.native(instructions)
    command = cpu_libraries.compiler()
    extra = ("-fsanitize=address", "-fno-omit-frame-pointer", "-O1", "-g")
    built = cpu_build.build(instructions, command, cpu_build.cache_directory(), cpu_build.torch_openmp(), extra)
    runtime = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Python itself leaks at exit.
    settings = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.morphoquant_vllm.cpu.cases", str(built), instructions],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "all cases agree" in run.stdout, run.stderr[-3000:]
