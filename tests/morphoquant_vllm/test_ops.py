"""The custom ops: frozen signatures, the dispatch, eager, fake and compiled."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import activation, linear
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

K, N, G, ROWS = 64, 48, 32, 6
# Triton's kernels run here interpreted, in a process of their own: gpu/test_gpu_ops.py.
BACKENDS = sorted(set(backends.BACKENDS) - {"triton"})


@pytest.fixture(scope="module")
def records() -> tuple[linear.WeightRecord, activation.ActivationRecord]:
    return record_of("group")


def record_of(scheme: str) -> tuple[linear.WeightRecord, activation.ActivationRecord]:
    layer = LayerSpec(K, N, G, "column", "layer", scale_scheme=scheme)
    spec = QuantizationSpec(layers={"layer": layer})
    (tensors,) = random_group(
        [torch.randn(N, K, generator=torch.Generator().manual_seed(1))], layer, spec, torch.tensor(2)
    )
    return weight_of(tensors), activation_of(tensors)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, K, generator=generator) * 3
    return x.to(dtype), torch.randint(ROWS, (tokens,), generator=generator, dtype=torch.int32)


def skip_where_it_does_not_run(backend: str) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")


def test_signatures_are_frozen() -> None:
    assert str(ops.linear.default._schema) == (
        "morphoquant::linear(Tensor x, Tensor modality, Tensor[] weight, Tensor[] activation, "
        "Tensor? bias, str backend) -> Tensor"
    )
    assert str(ops.act_quant.default._schema) == (
        "morphoquant::act_quant(Tensor x, Tensor modality, Tensor[] activation, str backend) -> Tensor"
    )


def test_the_heads_are_those_of_the_device_s_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8)
    head = backends.Head(lambda x, codes, scale: x + 8, lambda _: None, bfloat16=lambda x, weight: x + 16)
    monkeypatch.setitem(backends.BACKENDS, "cpu", replace(backends.BACKENDS["cpu"], head=head))
    monkeypatch.setattr(cpu, "available", lambda: True)
    assert torch.equal(ops.head(x, x, x), x + 8)
    assert torch.equal(ops.head_bfloat16(x, x), x + 16)
    monkeypatch.setattr(cpu, "available", lambda: False)
    for call in (lambda: ops.head(x, x, x), lambda: ops.head_bfloat16(x, x)):
        with pytest.raises(
            RuntimeError, match=r"this backend has no kernels for (a 16-bit )?lm_head on cpu; let vLLM compute it"
        ):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_every_backend_agrees_with_the_reference(records, backend: str, dtype: torch.dtype, tokens: int) -> None:
    skip_where_it_does_not_run(backend)
    weight, record = records
    x, modality = inputs(tokens, dtype)
    bias = torch.linspace(-1, 1, N).to(dtype)
    prepared_weight, prepared_activation = backends.BACKENDS[backend].prepare(weight, record)
    codes = ops.act_quant(x, modality, prepared_activation, backend)
    rows = activation.token_rows(x, modality, record)
    expected_codes = activation.act_quant(x, rows, record)
    assert torch.equal(codes, expected_codes)
    y = ops.linear(x, modality, prepared_weight, prepared_activation, bias, backend)
    expected = linear.matmul(expected_codes, rows, weight, record.gain, bias).to(dtype)
    assert y.dtype is dtype and y.shape == (tokens, N)
    bound = linear.output_bound(expected_codes, rows, weight, record.gain, expected)
    assert bool(((y.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_massive_token_takes_the_last_row_in_both_ops(records, backend: str) -> None:
    skip_where_it_does_not_run(backend)
    weight, record = records
    x, modality = inputs(80)
    massive = activation.is_massive(x, record.massive_channel, record.massive_low, record.massive_high)
    assert 5 < int(massive.sum()) < 75
    prepared_weight, prepared_activation = backends.BACKENDS[backend].prepare(weight, record)

    def same(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens get the same codes, and which the same output, under two choices of rows."""
        codes = [ops.act_quant(x, rows, prepared_activation, backend) for rows in (one, other)]
        y = [ops.linear(x, rows, prepared_weight, prepared_activation, None, backend) for rows in (one, other)]
        return (codes[0] == codes[1]).all(1), torch.isclose(*y).all(1)

    for equal in same(modality, torch.full_like(modality, ROWS - 1)):
        assert bool(equal[massive].all()), "whatever the modality"
    for equal in same(modality % (ROWS - 1), (modality + 1) % (ROWS - 1)):
        assert bool(equal[massive].all())
        assert not bool(equal[~massive].any()), "other tokens keep the row they are given"


def test_one_modality_buffer_serves_every_number_of_tokens(records) -> None:
    weight, record = records
    x, modality = inputs(5)
    longer = torch.cat((modality, torch.full((9,), 4, dtype=torch.int32)))
    short = ops.linear(x, modality, list(weight), list(record), None, "reference")
    assert torch.equal(short, ops.linear(x, longer, list(weight), list(record), None, "reference"))


@pytest.mark.parametrize(
    ("x", "modality"),
    [
        (torch.zeros(3, K), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(3, K), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, K), torch.zeros(3, 1, dtype=torch.int32)),
        (torch.zeros(1, 3, K), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, K + 1), torch.zeros(3, dtype=torch.int32)),
    ],
)
def test_wrong_shapes_and_dtypes_raise(records, x: Tensor, modality: Tensor) -> None:
    weight, record = records
    with pytest.raises(ValueError, match=r"x must be|modality must be|act_quant needs"):
        ops.linear(x, modality, list(weight), list(record), None, "reference")


def test_the_ops_are_well_formed_and_compile(records) -> None:
    weight, record = list(records[0]), list(records[1])
    x, modality = inputs(6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.act_quant.default, (x, modality, record, "reference"), test_utils=checks)
    torch.library.opcheck(ops.linear.default, (x, modality, weight, record, None, "reference"), test_utils=checks)

    def layer(x: Tensor, modality: Tensor) -> Tensor:
        return ops.linear(x, modality, weight, record, None, "reference") + 1

    # The eager backend of torch.compile traces as inductor would, without compiling C++ for a minute.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 3):
        x, modality = inputs(tokens)
        assert torch.equal(compiled(x, modality), layer(x, modality))
