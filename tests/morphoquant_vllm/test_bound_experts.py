"""The op of routed experts: its signature, whose experts a handle calls, refusals, fake and compiled."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from morphoquant_vllm import backends, handles, ops
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.experts import ExpertsRecord, experts
from tests.experts import random_experts, random_routing, random_tokens, record_of

COUNT, TOP, TOKENS, HERE = 4, 2, 7, "reference"
SERVING = sorted(name for name, backend in backends.BACKENDS.items() if backend.experts is not None)


def bound(seed: int = 0) -> tuple[Tensor, ExpertsRecord]:
    record = record_of(random_experts(COUNT, seed=seed))
    return bind(record), record


def bind(record: ExpertsRecord) -> Tensor:
    prepared = backends.prepare_experts("experts", record, torch.float32, HERE)
    return ops.bind_experts(prepared, record.down.absorbed_bias)


def test_the_signature_is_frozen() -> None:
    assert str(ops.bound_experts.default._schema) == (
        "morphoquant::bound_experts(Tensor x, Tensor modality, Tensor topk_weights, Tensor topk_ids, Tensor handle) "
        "-> Tensor"
    )


def test_the_reference_serves_experts() -> None:
    assert HERE in SERVING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_each_handle_calls_its_own_experts(dtype: torch.dtype, ids: torch.dtype) -> None:
    x, modality = random_tokens(TOKENS)
    topk_weights, topk_ids = random_routing(TOKENS, TOP, COUNT)
    # Entries past M belong to other tokens.
    longer = torch.cat((modality, torch.full((3,), 99, dtype=torch.int32)))
    layers = [bound(seed) for seed in range(2)]
    for handle, record in layers:
        y = ops.bound_experts(x.to(dtype), longer, topk_weights, topk_ids.to(ids), handle)
        assert torch.equal(y, experts(x.to(dtype), modality, topk_weights, topk_ids, record))


def test_two_layers_of_one_record_get_a_handle_each() -> None:
    first, record = bound()
    second = bind(record)
    assert first.data_ptr() != second.data_ptr()


def test_experts_are_freed_with_their_handle() -> None:
    handle, record = bound()
    address, codes = handle.data_ptr(), weakref.ref(record.down.codes)
    del record
    gc.collect()
    assert codes() is not None and handles.is_taken(handle)
    del handle
    gc.collect()
    assert codes() is None and address not in handles._LAYERS


def test_other_inputs_are_refused() -> None:
    handle, _ = bound()
    x, modality = random_tokens(TOKENS)
    weights, ids = random_routing(TOKENS, TOP, COUNT)
    with pytest.raises(RuntimeError, match="no layer is bound to this tensor"):
        ops.bound_experts(x, modality, weights, ids, handle.clone())
    with pytest.raises(ValueError, match="topk_ids and topk_weights must be"):
        ops.bound_experts(x, modality, weights[:3], ids, handle)
    with pytest.raises(ValueError, match="topk_weights must be float32"):
        ops.bound_experts(x, modality, weights.bfloat16(), ids, handle)
    with pytest.raises(ValueError, match="modality must be int32"):
        ops.bound_experts(x, modality[:2], weights, ids, handle)


def test_a_backend_without_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "none", backends.Backend(*[None] * 4))
    with pytest.raises(MorphoQuantError, match="list: the backend 'none' does not serve quantized experts; leave them"):
        backends.prepare_experts("list", record_of(random_experts(1)), torch.float32, "none")


def test_the_op_is_well_formed() -> None:
    handle, _ = bound()
    x, modality = random_tokens(TOKENS)
    given = (x, modality, *random_routing(TOKENS, TOP, COUNT), handle)
    real = ops.bound_experts(*given)
    with FakeTensorMode() as mode:
        fake = ops.bound_experts(*(mode.from_tensor(tensor) for tensor in given))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_a_compiled_graph_passes_the_handle_as_it_is() -> None:
    for seed in (0, 3):
        handle, record = bound(seed)

        def model(x: Tensor, modality: Tensor, weights: Tensor, ids: Tensor, handle: Tensor = handle) -> Tensor:
            return ops.bound_experts(x, modality, weights, ids, handle) + 1

        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (TOKENS, 3):
            given = (*random_tokens(tokens), *random_routing(tokens, TOP, COUNT))
            assert torch.equal(compiled(*given), experts(*given, record) + 1)
