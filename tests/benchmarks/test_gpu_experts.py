"""The GPU benchmark of experts: refuses without a GPU; its layers are made as vLLM's kernels want them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.peers.vllm_layers import unless_refused, vllm_context
from benchmarks.gpu_experts.__main__ import METHODS, PEERS, markdown
from benchmarks.gpu_experts.ways import PEERS as BUILDERS
from benchmarks.gpu_experts.ways import WAYS, ours, peer
from benchmarks.models.routed import Layer, generated, routing
from morphoquant_vllm.numerics.experts import experts

SMALL = Layer("small", 4, 2, 128, 64)
CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu_experts", *arguments], capture_output=True, text=True)


@pytest.fixture
def groups() -> Iterator[None]:
    """vLLM's parallel groups of one process."""
    with vllm_context():
        yield


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, SMALL.hidden, generator=generator).bfloat16(), *routing(3, SMALL, generator)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_it_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: this machine has no GPU; run it on one"]
    assert not (tmp_path / "results").exists()


def test_every_method_is_made_and_every_peer_named() -> None:
    assert set(METHODS) == set(WAYS)
    assert set(PEERS) == set(BUILDERS)


@pytest.mark.parametrize("two_level", [False, True])
def test_ours_is_the_op_on_the_generated_record(two_level: bool) -> None:
    x, weights, ids = given()
    y = ours(two_level, CPU)(SMALL, 32)(x, weights, ids)
    rows = torch.full((3,), 4, dtype=torch.int32)
    expected = experts(x, rows, weights, ids, generated(SMALL, 32, two_level))
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.float().abs().max()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_vllm_s_own_experts_run_in_16_bit(groups: None) -> None:
    x, weights, ids = given()
    y = peer("bf16", device=CPU)(SMALL, 32)(x, weights, ids)
    # All weights are 0.01, so all outputs of a token are equal.
    sums = 0.01 * x.float().sum(1)
    hidden = torch.nn.functional.silu(sums) * sums
    expected = (0.01 * SMALL.between * hidden)[:, None].expand(-1, SMALL.hidden)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=1e-3)


def test_marlin_gets_its_weights_in_compressed_tensors_layout(groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own choice of the kernel, as on a Hopper GPU; only the repacking and the product are left out."""
    # These look at the real platform when they are imported.
    from vllm.model_executor.layers.quantization import humming  # noqa: F401
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors  # noqa: F401
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as room,
    )
    from vllm.model_executor.layers.quantization.online import fp8  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    for name, value in {"is_cuda": True, "is_cpu": False, "is_cuda_alike": True, "has_device_capability": True}.items():
        monkeypatch.setattr(type(current_platform), name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_, **__: DeviceCapability(9, 0))
    seen: list[tuple[Any, Any]] = []
    method_class = room.CompressedTensorsWNA16MoEMethod
    monkeypatch.setattr(method_class, "process_weights_after_loading", lambda *made: seen.append(made))
    monkeypatch.setattr(method_class, "apply", lambda self, layer, x, *_: x)
    x, weights, ids = given()
    assert peer("w4a16", "marlin", CPU)(SMALL, 32)(x, weights, ids) is x
    ((method, layer),) = seen
    assert method.experts_cls.__name__ == "MarlinExperts"
    assert layer.w13_weight_packed.shape == (4, 128, 16) and layer.w2_weight_scale.shape == (4, 128, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_does_not_run_here_says_so_in_vllm_s_words(name: str, groups: None) -> None:
    reasons: dict[str, str] = {}
    with unless_refused(name, PEERS, reasons):
        BUILDERS[name](SMALL, 32)
    assert name in reasons


def test_the_table_has_a_row_for_each_number_of_tokens() -> None:
    rows = [
        {"layer": "experts", "M": 4, "method": "bf16", "us": 90.0},
        {"layer": "experts", "M": 4, "method": "morphoquant", "us": 30.0},
        {"layer": "experts", "M": 4, "method": "humming-w4a8", "skipped": "no module"},
    ]
    text = markdown({"command": "x", "device": "D", "group_size": 32, "versions": {}, "rows": rows})
    assert "| experts | 4 | 90.0 (1.00x) | 30.0 (3.00x) | no module |" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_it_measures_on_the_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path), "--tokens", "1", "--methods", "bf16", "morphoquant")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*-G32.json"))
