"""The kernels on the GPU at hand, through the ops: agreement, CUDA graphs, no synchronisation, no late compilation.

They have passed on one H100 and, at commit d237748, on one H200 (docs/results/gpu.md).
"""

from dataclasses import replace

import pytest
import torch

from morphoquant_vllm import backends, ops
from morphoquant_vllm.numerics import activation as activation_numerics
from morphoquant_vllm.numerics import head as head_numerics
from morphoquant_vllm.numerics import linear as linear_numerics
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord
from tests.morphoquant_vllm.gpu.cases import Case, layer, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand"),
]

CASES = [
    Case(m, n, k, g, dtype=dtype, bias=bias)
    for m in (1, 2, 7, 16, 17, 64, 65, 300, 512)
    for n, k, g in ((200, 96, 32), (3584, 3584, 32), (1152, 896, 64), (896, 4864, 128))
    for dtype, bias in ((torch.bfloat16, True), (torch.float16, False))
]
CASES += [replace(case, two_level=True) for case in CASES]
CASES += [replace(case, in_order=True) for case in CASES if case.tokens in (1, 300) and not case.two_level]


def on_gpu(case: Case) -> tuple[WeightRecord, ActivationRecord, torch.Tensor, torch.Tensor]:
    weight, record = layer(case)
    x, modality = tokens(case, record)
    moved = WeightRecord(*(t.cuda() for t in weight)), ActivationRecord(*(t.cuda() for t in record))
    return *moved, x.cuda(), modality.cuda()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_agree_with_the_reference(case: Case) -> None:
    weight, record, x, modality = on_gpu(case)
    bias = torch.linspace(-1, 1, case.out_features, device="cuda").to(case.dtype) if case.bias else None
    backend = backends.BACKENDS["triton"]
    backend.check("layer", weight, record, case.dtype)
    prepared, prepared_activation = backend.prepare(weight, record)
    rows = activation_numerics.token_rows(x, modality, record)
    expected_codes = activation_numerics.act_quant(x, rows, record)
    assert torch.equal(ops.act_quant(x, modality, prepared_activation, "triton"), expected_codes)
    y = ops.linear(x, modality, prepared, prepared_activation, bias, "triton")
    handle = ops.bind(prepared, prepared_activation, bias, case.dtype, "triton")
    assert torch.equal(ops.bound_linear(x, modality, handle, bias), y)
    expected = linear_numerics.matmul(expected_codes, rows, weight, record.gain, bias).to(case.dtype)
    # On the CPU: the bound's group sums would need a float32 product without TF32.
    on_cpu = WeightRecord(*(t.cpu() for t in weight))
    bound = linear_numerics.output_bound(expected_codes.cpu(), rows.cpu(), on_cpu, record.gain.cpu(), expected.cpu())
    assert bool(((y.double() - expected.double()).abs().cpu() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_op_quantizes_torch_s_silu_and_mul(dtype: torch.dtype) -> None:
    from morphoquant_vllm.gpu import launch, layout

    case = Case(64, 896, 4864, 128, dtype=dtype)
    _, record, up, modality = on_gpu(case)
    gate = torch.randn(up.shape, generator=torch.Generator().manual_seed(3)).to(dtype).cuda()
    x = torch.nn.functional.silu(gate) * up
    expected = activation_numerics.act_quant(x, activation_numerics.token_rows(x, modality, record), record)
    prepared = layout.prepare_activation(record)
    codes, _ = launch.quantize(torch.cat((gate, up), 1), modality, prepared, silu_mul=True, units=1)
    # Two exponentials differ in the last bits of float32: few values are so near a tie of 16 bit and of the code.
    assert float((codes != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("count", [1, 16, 200])
def test_a_captured_graph_replays_on_new_input(count: int, in_order: bool) -> None:
    case = Case(count, 3584, 3584, 64, in_order=in_order)
    weight, record, x, modality = on_gpu(case)
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    handle = ops.bind(prepared, prepared_activation, None, case.dtype, "triton")
    torch.cuda.synchronize()
    static = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.bound_linear(static, modality, handle, None)
    static.copy_(x)
    graph.replay()
    expected = ops.bound_linear(x, modality, handle, None)
    assert torch.equal(y, expected), "the same bits: no sum depends on the order in which programs end"


@pytest.mark.parametrize("in_order", [False, True])
def test_no_call_synchronises_with_the_host_or_compiles(in_order: bool) -> None:
    from morphoquant_vllm.gpu import product_launch, quantize_launch

    kernels = [quantize_launch.quantize_activation, quantize_launch.quantize_in_order, quantize_launch.quantize_tokens]
    kernels += [product_launch.int4_gemm, product_launch.reduce_splits]

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    case = Case(512, 896, 4864, 128, in_order=in_order)
    weight, record, x, modality = on_gpu(case)
    prepared, prepared_activation = backends.BACKENDS["triton"].prepare(weight, record)
    handle = ops.bind(prepared, prepared_activation, None, case.dtype, "triton")
    gate_up = torch.cat((x, x), 1)
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (1, 2, 3, 16, 17, 31, 64, 65, 511, 512):
            ops.bound_linear(x[:count], modality, handle, None)
            ops.bound_silu_mul_linear(gate_up[:count], modality, handle, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 16, 17, 300])
def test_logits_of_the_8_bit_head_lie_within_the_bound(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    codes, scale = head_numerics.quantize_outputs(torch.randn((1000, 1536), generator=generator).to(dtype))
    x = torch.randn((count, 1536), generator=generator).to(dtype)
    backend = backends.BACKENDS["triton"].head
    backend.check(codes.cuda(), scale.cuda(), dtype)
    y = ops.head(x.cuda(), codes.cuda(), scale.cuda()).cpu()
    expected = head_numerics.head(x, codes, scale)
    bound = head_numerics.output_bound(x, codes, scale, expected)
    assert bool(((y.double() - expected.double()).abs() <= bound).all())
