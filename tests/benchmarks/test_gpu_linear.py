"""The GPU benchmark: refuses without a GPU; with one, it writes a result."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.common.peers.vllm_layers import unless_refused, vllm_context
from benchmarks.gpu_linear import peers
from benchmarks.gpu_linear.__main__ import METHODS, PEERS
from benchmarks.gpu_linear.layers import LAYERS
from benchmarks.gpu_linear.report import markdown


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu_linear", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_it_refuses_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: this machine has no GPU; run it on one, or estimate with benchmarks.gpu_cost_model"
    ]
    assert not (tmp_path / "results").exists()


def test_vllm_s_kernels_find_their_groups_and_leave_none_behind() -> None:
    """In a process of its own: groups are the process's. Without them a peer's layer ends in an assertion."""
    code = """
from benchmarks.common.peers.vllm_layers import vllm_context, why_no_vllm
assert why_no_vllm() == ""
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, model_parallel_is_initialized
assert not model_parallel_is_initialized()
with vllm_context():
    assert get_tensor_model_parallel_world_size() == 1
    get_current_vllm_config()
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    ColumnParallelLinear(64, 32, bias=False)
assert not model_parallel_is_initialized()
print("sound")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("sound"), done.stderr


def test_the_table_tells_the_host_s_time_beside_the_device_s() -> None:
    shape = {"layer": "o", "N": 8, "K": 8, "M": 1}
    rows = [
        shape | {"method": "bf16", "us": 20.0, "spread": 1.0, "host_us": 9.4},
        shape | {"method": "morphoquant", "us": 8.0, "spread": 1.0, "host_us": 31.6},
        shape | {"method": "marlin-w4a16", "skipped": "no such kernel"},
    ]
    text = markdown({"device": "D", "group_size": 32, "versions": {}, "rows": rows})
    assert "| o | 1 | 20.0 (1.00x), host 9 | 8.0 (2.50x), host 32 | no such kernel |" in text


def test_every_method_has_a_layer_and_every_peer_a_name() -> None:
    assert set(METHODS) == set(LAYERS)
    assert set(PEERS) == set(peers.PEERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_does_not_run_here_says_so_in_vllm_s_words(name: str) -> None:
    reason = peers.PEERS[name](256, 512, 128)
    assert isinstance(reason, str) and "CUDA" in reason


@pytest.fixture
def groups() -> Iterator[None]:
    """vLLM's parallel groups of one process."""
    with vllm_context():
        yield


MIXED = {
    "machete": ("MacheteLinearKernel", torch.bfloat16, {}),
    "cutlass": ("CutlassW4A8LinearKernel", torch.float8_e4m3fn, {"weight_type": "int4"}),
    "humming": ("HummingLinearKernel", torch.int8, {"per_channel": True}),
}


@pytest.mark.parametrize("module", MIXED)
def test_a_mixed_precision_layer_is_made_as_its_kernel_wants_it(
    module: str, groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own checks of the kernel and its constructor, as on a Hopper GPU; only the repacking is left out."""
    from vllm.model_executor.kernels.linear import mixed_precision
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    name, activation, others = MIXED[module]
    kernel_class = getattr(__import__(f"{mixed_precision.__name__}.{module}", fromlist=[name]), name)
    room = sys.modules[kernel_class.__module__]
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_, **__: DeviceCapability(9, 0))
    if module == "humming":
        monkeypatch.setattr(room, "has_humming", lambda: True)
    seen = []
    monkeypatch.setattr(kernel_class, "process_weights_after_loading", lambda self, layer: seen.append((self, layer)))
    monkeypatch.setattr(kernel_class, "apply_weights", lambda self, layer, x: x)
    cpu = torch.device("cpu")
    call = peers.mixed_precision(module, name, activation, device=cpu, **others)(256, 512, 128)
    assert not isinstance(call, str), call
    ((kernel, layer),) = seen
    assert layer.weight_packed.shape == (256, 64)
    assert layer.weight_scale.shape == (256, 1 if others.get("per_channel") else 4)
    assert kernel.config.group_size == (-1 if others.get("per_channel") else 128)
    # A group size that CUTLASS does not take is refused by it.
    if module == "cutlass":
        assert peers.mixed_precision(module, name, activation, device=cpu, **others)(256, 512, 32) == (
            "Only group_size 128 is supported"
        )


def test_the_int8_layer_is_made_as_its_kernel_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    calls = []
    monkeypatch.setattr(cutlass.ops, "scaled_int8_quant", lambda x, *_, **__: (x, "scale", None))
    monkeypatch.setattr(cutlass.ops, "cutlass_scaled_mm", lambda x, w, **named: calls.append((x, w, named)))
    call = peers.int8_by_int8(torch.device("cpu"))(48, 64, 32)
    assert not isinstance(call, str), call
    call(torch.zeros(3, 64, dtype=torch.bfloat16))
    ((_, weight, named),) = calls
    assert weight.shape == (64, 48) and weight.dtype is torch.int8
    assert named["scale_b"].shape == (48, 1) and named["out_dtype"] is torch.bfloat16


def test_a_peer_s_error_is_its_reason_and_ours_is_an_error() -> None:
    reasons: dict[str, str] = {}
    with unless_refused("machete-w4a16", PEERS, reasons):
        raise RuntimeError("no kernel image\n is available")
    assert reasons == {"machete-w4a16": "RuntimeError: no kernel image is available"}
    with pytest.raises(RuntimeError), unless_refused("morphoquant", PEERS, reasons):
        raise RuntimeError("ours")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_it_measures_on_the_gpu(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path), "--tokens", "1", "--layers", "o", "--methods", "bf16", "morphoquant")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.json")
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in json.loads(written.read_text())["rows"])
