"""The CPU kernels of routed experts against the dense kernels and the torch reference."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import backends, ops
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import experts as cpu_experts
from morphoquant_vllm.cpu.build import Kernels
from morphoquant_vllm.cpu.experts import Prepared
from morphoquant_vllm.cpu.layout import HEADER_BYTES
from morphoquant_vllm.numerics import activation
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts
from morphoquant_vllm.numerics.weights import unpack
from tests.morphoquant_vllm.cpu.cases import ROWS, tokens_of
from tests.morphoquant_vllm.cpu.experts_cases import (
    DTYPES,
    ROUTINGS,
    SHAPES,
    compare_case,
    experts_case,
    routing_of,
)

COUNT, HIDDEN, BETWEEN = 5, 64, 96


def small(two_level: bool = False) -> ExpertsRecord:
    return experts_case(COUNT, HIDDEN, BETWEEN, 32, two_level)


def inputs(tokens: int, slots: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *tokens_of(tokens, HIDDEN, dtype), *routing_of(tokens, slots, COUNT)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_products_are_the_dense_ones_and_outputs_within_the_bound(
    library: Kernels, threads: int, shape: tuple, two_level: bool
) -> None:
    record = experts_case(*shape, two_level)
    for index, (tokens, slots) in enumerate(ROUTINGS):
        compare_case(record, tokens, slots, DTYPES[(index + threads) % 3], library)


def test_sums_of_down_are_exact_at_the_extremes(library: Kernels) -> None:
    """Scale 1 on one group and 0 on the others: the float32 output is the integer sum itself."""
    record = small()
    down, between = record.down, record.intermediate
    scale = torch.zeros_like(down.scale)
    scale[:, :, 1] = 1
    record = record._replace(
        down=down._replace(scale=scale, absorbed_bias=torch.zeros_like(down.absorbed_bias)),
        intermediate=between._replace(mask=torch.ones_like(between.mask), gain=torch.ones_like(between.gain)),
    )
    prepared = cpu_experts.prepare(record)
    tokens = 40
    x, modality = tokens_of(tokens, HIDDEN, torch.float32)
    ids = torch.arange(tokens)[:, None] % COUNT
    _, pairs = cpu_experts.gate_up(x, modality, ids, prepared, library)
    h = tokens_of(tokens, BETWEEN, torch.float32)[0] * 1e4
    y = torch.empty(tokens, HIDDEN)
    cpu_experts.down(h[pairs.token.long()], modality, torch.ones(tokens, 1), ids, pairs, prepared, y, library)
    seen = set()
    for token in range(tokens):
        _, weight, own = record.expert(token % COUNT)
        one = h[token][None]
        codes = activation.act_quant(one, activation.token_rows(one, modality[token : token + 1], own), own)
        seen |= set(codes[0].tolist())
        expected = codes[0, 32:64].long() @ unpack(weight.codes)[:, 32:64].long().T
        assert torch.equal(y[token], expected.float())
    assert {-128, 127} <= seen


@pytest.mark.parametrize("two_level", [False, True])
def test_a_token_gets_the_same_output_in_every_batch_and_from_any_threads(library: Kernels, two_level: bool) -> None:
    """To the last bit. In the whole batch one expert has enough tokens to unpack strips, in the parts none has."""
    prepared = cpu_experts.prepare(small(two_level))
    batch = inputs(80, 2)
    before = torch.get_num_threads()
    try:
        together = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together.append(cpu_experts.run(*batch, prepared, library))
            assert torch.equal(together[0], together[-1])
    finally:
        torch.set_num_threads(before)
    for first, last in ((0, 1), (1, 3), (3, 20), (20, 80)):
        part = cpu_experts.run(*(tensor[first:last] for tensor in batch), prepared, library)
        assert torch.equal(part, together[0][first:last])


def test_all_tokens_of_one_expert_and_more_than_a_panel_holds(library: Kernels, threads: int) -> None:
    for two_level in (False, True):
        prepared = cpu_experts.prepare(small(two_level))
        x, modality = tokens_of(400, HIDDEN, torch.bfloat16)
        weights, ids = torch.ones(400, 1), torch.full((400, 1), 3)
        y = cpu_experts.run(x, modality, weights, ids, prepared, library)
        for first in (0, 190, 399):
            part = slice(first, first + 1)
            one = cpu_experts.run(x[part], modality[part], weights[part], ids[part], prepared, library)
            assert torch.equal(one, y[part])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("other", [-1, COUNT, 2**31 - 1])
def test_experts_of_other_ranks_add_nothing(library: Kernels, kind: torch.dtype, other: int) -> None:
    prepared = cpu_experts.prepare(small())
    x, modality, weights, ids = inputs(9, 3)
    ids = ids.clamp(0, COUNT - 1).to(kind)
    elsewhere = ids.clone()
    elsewhere[:, 1] = other
    ours = cpu_experts.run(x, modality, weights, elsewhere, prepared, library)
    assert torch.equal(ours, cpu_experts.run(x, modality, weights[:, ::2].contiguous(), ids[:, ::2], prepared, library))
    nothing = cpu_experts.run(x, modality, weights, torch.full_like(ids, other), prepared, library)
    assert nothing.shape == x.shape and not nothing.any()


def test_a_wide_id_is_not_cut_to_an_expert(library: Kernels) -> None:
    x, modality, weights, ids = inputs(4, 2)
    wide = torch.full_like(ids, 2**32, dtype=torch.int64)
    assert not cpu_experts.run(x, modality, weights, wide, cpu_experts.prepare(small()), library).any()


@pytest.mark.parametrize(("tokens", "slots"), [(0, 2), (3, 0)])
def test_no_token_and_no_slot(library: Kernels, tokens: int, slots: int) -> None:
    x, modality = tokens_of(tokens, HIDDEN, torch.bfloat16)
    ids = torch.zeros(tokens, slots, dtype=torch.int32)
    y = cpu_experts.run(x, modality, torch.zeros(tokens, slots), ids, cpu_experts.prepare(small()), library)
    assert y.shape == (tokens, HIDDEN) and not y.any()


def test_long_prompts_in_parts(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, batch = cpu_experts.prepare(small(True)), inputs(50, 3, torch.bfloat16)
    whole = cpu_experts.run(*batch, prepared, library)
    for most in (1, 7, 100):
        monkeypatch.setattr(cpu_experts, "MOST_PAIRS", most)
        assert torch.equal(cpu_experts.run(*batch, prepared, library), whole)


def test_strided_inputs(library: Kernels) -> None:
    prepared, (x, modality, weights, ids) = cpu_experts.prepare(small()), inputs(7, 3)
    expected = cpu_experts.run(x, modality, weights, ids, prepared, library)
    views = (torch.cat((x, x), 1)[:, HIDDEN:], x.T.contiguous().T)
    for view in views:
        assert not view.is_contiguous()
        strided = (weights.T.contiguous().T, ids.T.contiguous().T)
        assert torch.equal(cpu_experts.run(view, modality, *strided, prepared, library), expected)


def test_the_reference_agrees_on_the_whole_layer(library: Kernels, threads: int) -> None:
    for two_level in (False, True):
        record = small(two_level)
        x, modality, weights, ids = inputs(31, 3)
        expected = experts(x, modality[:31], weights, ids, record)
        y = cpu_experts.run(x, modality, weights, ids, cpu_experts.prepare(record), library)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


def test_the_op_is_bound_to_the_kernels_and_compiles() -> None:
    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    record, (x, modality, weights, ids) = small(), inputs(6, 2)
    prepared = backends.prepare_experts("experts", record, torch.float32, "cpu")
    handle = ops.bind_experts(prepared, record.down.absorbed_bias)
    given = (x, modality, weights, ids, handle)
    expected = cpu_experts.run(x, modality, weights, ids, cpu_experts.prepare(record))
    compiled = torch.compile(lambda x: ops.bound_experts(x, *given[1:]) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected + 1)


@pytest.mark.parametrize("row", [ROWS, -1, 2**31 - 1])
def test_a_row_that_does_not_exist_is_refused(library: Kernels, threads: int, row: int) -> None:
    prepared = cpu_experts.prepare(small())
    _, _, weights, ids = inputs(3, 2)
    modality = torch.tensor([0, 0, row], dtype=torch.int32)
    with pytest.raises(IndexError, match="modality names a row"):
        cpu_experts.run(torch.zeros(3, HIDDEN), modality, weights, ids, prepared, library)


@pytest.mark.parametrize("two_level", [False, True])
def test_prepared_records_are_no_larger_than_the_canonical_ones(two_level: bool) -> None:
    record = experts_case(3, 256, 256, 64, two_level)
    prepared = cpu_experts.prepare(record)
    for canonical, ours in ((record.gate_up, prepared.gate_up), (record.down, prepared.down)):
        size = sum(part.nbytes for part in canonical)
        # With levels, the start value of each output's sums: an int32.
        own = HEADER_BYTES + (4 * canonical.codes.shape[1] if two_level else 0)
        assert ours.weight.nbytes + ours.absorbed_bias.nbytes == size + 3 * own
        assert ours.weight.data_ptr() != canonical.codes.data_ptr()
    assert prepared.down.activation.nbytes <= sum(part.nbytes for part in record.intermediate) + 3 * 64 * 9


def _native_code(call: bytes) -> int:
    raise AssertionError("native code was called")


UNCALLABLE = Kernels(_native_code, _native_code, _native_code, _native_code, 0, "none")
GOOD = (torch.zeros(3, HIDDEN), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 2), torch.zeros(3, 2).int())


@pytest.mark.parametrize(
    ("place", "wrong", "words"),
    [
        (0, torch.zeros(3, HIDDEN, dtype=torch.float64), "x must be float32"),
        (0, torch.zeros(HIDDEN), "x must be float32"),
        (0, torch.zeros(3, 2 * HIDDEN), f"x must have {HIDDEN} channels"),
        (0, torch.zeros(3, HIDDEN, device="meta"), "on the CPU"),
        (1, torch.zeros(2, dtype=torch.int32), "modality must be int32 with 3"),
        (1, torch.zeros(3, dtype=torch.int64), "modality must be int32 with 3"),
        (2, torch.zeros(3, 2, dtype=torch.bfloat16), "topk_weights must be float32"),
        (2, torch.zeros(3, 1), "topk_weights must be float32"),
        (3, torch.zeros(3, 2), "topk_ids must be integers"),
        (3, torch.zeros(2, 2, dtype=torch.int32), "topk_ids must be integers"),
        (3, torch.zeros(3, 2, dtype=torch.int32, device="meta"), "on the CPU"),
    ],
)
def test_wrong_inputs_raise_before_native_code_runs(place: int, wrong: Tensor, words: str) -> None:
    given = list(GOOD)
    given[place] = wrong
    with pytest.raises(ValueError, match=words):
        cpu_experts.run(*given, cpu_experts.prepare(small()), UNCALLABLE)


def _damaged(projection: str, field: str, at: int, value: int) -> Prepared:
    """Prepared records with one number of the third expert's header changed."""
    prepared = cpu_experts.prepare(small())
    getattr(getattr(prepared, projection), field)[-1][:HEADER_BYTES].view(torch.int64)[at] = value
    return prepared


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        ("weight", 0, 7),
        ("weight", 1, 1 << 40),
        ("weight", 2, HIDDEN + BETWEEN),
        ("weight", 3, 16),
        ("weight", 4, 64),
        ("weight", 4, 0),
        ("activation", 0, 7),
        ("activation", 1, 1 << 40),
        ("activation", 1, 63),
        ("activation", 2, 32),
        ("activation", 3, ROWS + 1),
        ("activation", 5, 1 << 30),
    ],
)
def test_records_that_do_not_fit_raise_before_they_are_read(
    library: Kernels, projection: str, field: str, at: int, value: int
) -> None:
    prepared = _damaged(projection, field, at, value)
    ids = torch.full((3, 2), COUNT - 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"the records must come from cpu\.layout\.prepare"):
        cpu_experts.run(*GOOD[:3], ids, prepared, library)


def test_experts_of_different_schemes_are_not_mixed(library: Kernels) -> None:
    """With these sizes the blocks of both schemes have one length."""
    prepared, other = (cpu_experts.prepare(experts_case(3, 256, 32, 32, two_level)) for two_level in (False, True))
    prepared.gate_up.weight[1] = other.gate_up.weight[1]
    x, modality = tokens_of(2, 256, torch.float32)
    weights, ids = torch.ones(2, 1), torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="the records must come from"):
        cpu_experts.run(x, modality, weights, ids, prepared, library)
    for alone in (0, 2):
        cpu_experts.run(x, modality, weights, torch.full_like(ids, alone), prepared, library)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record._replace(down=record.gate_up),
        lambda record: record._replace(intermediate=record.intermediate._replace(gain=record.intermediate.gain[:, :1])),
        lambda record: record._replace(input=record.input._replace(gain=record.input.gain.double())),
        lambda record: record._replace(gate_up=type(record.gate_up)(*(field[:, :-16] for field in record.gate_up))),
        lambda record: ExpertsRecord(
            *(type(part)(*(field[:0] for field in part)) if part is not record.input else part for part in record)
        ),
    ],
    ids=["down of other shapes", "rows missing", "gain float64", "outputs of up missing", "no experts"],
)
def test_records_that_contradict_each_other_are_not_prepared(change) -> None:
    with pytest.raises(ValueError, match=r"the CPU kernels do not take these records"):
        cpu_experts.prepare(change(small()))
