"""Handles: whose layer a call gets, how long it lives, and what compiled graphs make of them."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from morphoquant_vllm import handles, ops
from morphoquant_vllm.numerics import linear
from tests.morphoquant_vllm.test_ops import G, K, N, inputs, record_of

HERE = "reference"


def bound(seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A handle, and the records of its layer; layers of other seeds have other weights."""
    weight, activation = record_of("group")
    weight = weight._replace(codes=weight.codes.roll(seed, 0), absorbed_bias=weight.absorbed_bias.clone())
    records = list(weight), list(activation)
    return ops.bind(*records, None, torch.float32, HERE), *records


def expected(x: Tensor, modality: Tensor, weight: list[Tensor], activation: list[Tensor]) -> Tensor:
    return ops.linear(x, modality, weight, activation, None, HERE)


def test_signatures_are_frozen() -> None:
    arguments = "Tensor modality, Tensor handle, Tensor? bias) -> Tensor"
    assert str(ops.bound_linear.default._schema) == f"morphoquant::bound_linear(Tensor x, {arguments}"
    assert str(ops.bound_silu_mul_linear.default._schema) == (
        f"morphoquant::bound_silu_mul_linear(Tensor gate_up, {arguments}"
    )


def test_each_handle_calls_its_own_layer() -> None:
    layers = [bound(seed) for seed in range(3)]
    x, modality = inputs(5)
    results = [ops.bound_linear(x, modality, layer[0], None) for layer in layers]
    for result, layer in zip(results, layers, strict=True):
        assert torch.equal(result, expected(x, modality, *layer[1:]))
    assert not torch.equal(results[0], results[1])


def test_two_layers_that_share_the_tensor_get_a_handle_each() -> None:
    weight, activation = (list(record) for record in record_of("group"))
    first = ops.bind(weight, activation, None, torch.float32, HERE)
    other = [weight[0].roll(1, 0), *weight[1:]]
    second = ops.bind(other, activation, None, torch.float32, HERE)
    assert first is weight[-1] and second is not first
    x, modality = inputs(4)
    for handle, record in ((first, weight), (second, other)):
        assert torch.equal(ops.bound_linear(x, modality, handle, None), expected(x, modality, record, activation))


def test_a_layer_is_freed_with_its_handle() -> None:
    handle, weight, _ = bound()
    address, codes = handle.data_ptr(), weakref.ref(weight[0])
    assert handles.is_taken(handle)
    del weight[:]
    assert codes() is not None, "the layer keeps its weights"
    del handle, weight, _
    gc.collect()
    assert codes() is None
    assert address not in handles._LAYERS


def test_a_handle_that_c_plus_plus_alone_holds_keeps_its_layer() -> None:
    """As autograd or a captured graph may hold it: the Python object is gone for Python, not for torch."""
    handle, weight, _ = bound()
    address = handle.data_ptr()
    holder = torch.jit.annotate(list[Tensor], [handle])
    module = torch.nn.ParameterList()
    module.register_buffer("handle", handle)
    del handle, weight[-1]
    gc.collect()
    assert address in handles._LAYERS
    assert module.handle.data_ptr() == holder[0].data_ptr() == address


def test_an_address_that_is_used_again_is_the_new_layer_s() -> None:
    """Layers are loaded and freed in turn; the allocator gives the same memory out again."""
    x, modality = inputs(3)
    addresses = set()
    for seed in range(20):
        handle, weight, activation = bound(seed)
        addresses.add(handle.data_ptr())
        assert torch.equal(ops.bound_linear(x, modality, handle, None), expected(x, modality, weight, activation))
        del handle, weight, activation
    assert len(addresses) < 20, "the test needs an address twice"


def test_another_tensor_is_refused() -> None:
    handle, *_ = bound()
    x, modality = inputs(3)
    for tensor in (handle.clone(), torch.zeros(6, N)):
        with pytest.raises(RuntimeError, match="no layer is bound to this tensor"):
            ops.bound_linear(x, modality, tensor, None)


def test_weights_that_are_loaded_into_the_same_tensors_are_served() -> None:
    """As vLLM reloads weights: a second layer is bound, its tensors are copied into those of the first, and it goes."""
    first, weight, activation = bound(0)
    second, new_weight, _ = bound(5)
    for old, new in zip(weight, new_weight, strict=True):
        old.copy_(new)
    del second
    x, modality = inputs(6)
    assert torch.equal(ops.bound_linear(x, modality, first, None), expected(x, modality, new_weight, activation))


def test_the_ops_are_well_formed() -> None:
    handle, *_ = bound()
    x, modality = inputs(6)
    gate_up = torch.cat((x, x), 1)
    # Not torch.library.opcheck, which gives the ops copies of their tensors.
    for op, given in ((ops.bound_linear, x), (ops.bound_silu_mul_linear, gate_up)):
        real = op(given, modality, handle, None)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(tensor) for tensor in (given, modality, handle)), None)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    fused = ops.bound_silu_mul_linear(gate_up, modality, handle, None)
    assert torch.equal(fused, ops.bound_linear(torch.nn.functional.silu(x) * x, modality, handle, None))


class Layer(torch.nn.Module):
    """A module whose buffer is the handle, as vLLM's layers have it."""

    def __init__(self, handle: Tensor) -> None:
        super().__init__()
        self.register_buffer("handle", handle, persistent=False)

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        return ops.bound_linear(x, modality, self.handle, None) + 1


def test_compiled_layers_share_a_graph_that_holds_no_handle() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layers = [bound(seed) for seed in range(3)]
    modules = [Layer(handle) for handle, *_ in layers]

    def model(x: Tensor, modality: Tensor) -> list[Tensor]:
        return [module(x, modality) for module in modules]

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (6, 3):
        x, modality = inputs(tokens)
        for y, layer in zip(compiled(x, modality), layers, strict=True):
            assert torch.equal(y, expected(x, modality, *layer[1:]) + 1)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "bound_linear" in str(node.target)]
    assert len(calls) == 3
    assert all(call.args[2].op in ("placeholder", "get_attr") for call in calls)
    assert not [node for node in graph.graph.nodes if node.op == "get_attr" and "constant" in str(node.target)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiler_passes_the_handle_as_it_is(backend: str) -> None:
    """Through torch's own compiler, and again with other weights: a cached graph serves another layer."""
    x, modality = inputs(7)
    for seed in (0, 4):
        handle, weight, activation = bound(seed)
        compiled = torch.compile(Layer(handle), backend=backend, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x, modality), expected(x, modality, weight, activation) + 1)


def test_the_handle_is_the_absorbed_bias() -> None:
    """Whose shape tells a compiler how wide the output is."""
    handle, weight, _ = bound()
    assert handle is weight[linear.WeightRecord._fields.index("absorbed_bias")]
    assert handle.shape[1] == N and K % G == 0
