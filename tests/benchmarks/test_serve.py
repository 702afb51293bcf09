"""benchmarks.serve: checkpoints that vLLM loads, figures read from its reports, and the tables of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.common.files import weight_bytes
from benchmarks.models.shapes import MODELS, linears, sixteen_bit_bytes
from benchmarks.serve import engine, formats, memory
from benchmarks.serve.__main__ import METHODS, measure_model, thread_settings, too_large
from benchmarks.serve.checkpoints import write_checkpoint
from benchmarks.serve.engine import RunError, Settings
from benchmarks.serve.report import write
from benchmarks.serve.summary import summarize
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.verify import verify_checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


def scheme_of(quantization: dict[str, Any]) -> str:
    """The scheme that vLLM takes settings of compressed-tensors for; it asks the GPU's age, so one is made up."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as module

    config = module.CompressedTensorsConfig.from_config(quantization)
    settings = config.target_scheme_map["Linear"]
    weights, activations = settings["weights"], settings["input_activations"]
    if module.is_activation_quantization_format(quantization["format"]):
        if config._is_nvfp4_format(weights) and config._is_nvfp4_format(activations):
            return "CompressedTensorsW4A4Fp4"
        if config._is_fp8_w8a8(weights, activations):
            return "CompressedTensorsW8A8Fp8"
    return str(settings)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_checkpoint_has_the_tensors_of_its_format(work: Path, kind: str) -> None:
    directory = write_checkpoint("tiny", kind, work)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    layer = load_file(directory / "model-layer-01.safetensors")
    up, o = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"
    assert layer["model.layers.1.self_attn.k_proj.bias"].shape == (64,) and f"{o}.bias" not in layer
    quantization = config.get("quantization_config")
    if kind == "bf16":
        assert quantization is None and layer[f"{up}.weight"].shape == (256, 128)
    elif kind == "gptq":
        assert quantization["quant_method"] == "gptq"
        shapes = {name: tuple(layer[f"{up}.{name}"].shape) for name in ("qweight", "qzeros", "scales", "g_idx")}
        assert shapes == {"qweight": (16, 256), "qzeros": (1, 32), "scales": (1, 256), "g_idx": (128,)}
    elif kind == "w8a8":
        assert quantization["quant_method"] == "compressed-tensors"
        assert layer[f"{up}.weight"].dtype is torch.int8 and layer[f"{up}.weight_scale"].shape == (256, 1)
    elif kind in ("fp8", "nvfp4"):
        assert scheme_of(quantization) == {"fp8": "CompressedTensorsW8A8Fp8", "nvfp4": "CompressedTensorsW4A4Fp4"}[kind]
        weight = layer[f"{up}.weight" if kind == "fp8" else f"{up}.weight_packed"]
        assert weight.shape == (256, 128 if kind == "fp8" else 64)
        assert layer[f"{up}.weight_scale"].shape == (256, 1 if kind == "fp8" else 8)
    else:
        assert len(verify_checkpoint(directory).layers) == 14
        scale = {"group": "weight_scale", "two_level": "weight_level"}[formats.scale_scheme(kind)]
        assert layer[f"{up}.{scale}"].shape == (256, 128 // formats.group_size(kind))


def test_a_checkpoint_is_written_once(work: Path) -> None:
    directory = write_checkpoint("tiny", "bf16", work)
    before = (directory / "config.json").stat().st_mtime_ns
    assert write_checkpoint("tiny", "bf16", work) == directory
    assert (directory / "config.json").stat().st_mtime_ns == before
    assert 1 < weight_bytes(directory) / sixteen_bit_bytes("tiny") < 1.1, "also norms, biases and headers"


def test_generated_weights_keep_the_variance_of_their_input() -> None:
    """Every format's matrix has rows of norm about 1, so activations stay finite."""
    linear = next(linear for linear in linears("tiny") if linear.name == "mlp.down_proj")
    generator = torch.Generator().manual_seed(0)
    kinds = ("bf16", "gptq", "w8a8", "fp8", "nvfp4", "morphoquant-g32")
    made = {kind: formats.tensors(kind, linear, generator) for kind in kinds}
    shifts = torch.arange(0, 32, 4)
    codes = (made["gptq"]["qweight"][:, None] >> shifts[None, :, None] & 15).flatten(0, 1) - 8
    from morphoquant_vllm.numerics.weights import dequantize_weight

    ours = made["morphoquant-g32"]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    packed = made["nvfp4"]["weight_packed"]
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    decoded = torch.where(nibbles < 8, 1.0, -1.0) * values[nibbles % 8]
    matrices = {
        "bf16": made["bf16"]["weight"].float(),
        "gptq": (codes * made["gptq"]["scales"].float().repeat_interleave(128, 0)).T,
        "w8a8": made["w8a8"]["weight"] * made["w8a8"]["weight_scale"],
        "fp8": made["fp8"]["weight"].float() * made["fp8"]["weight_scale"],
        "nvfp4": decoded / made["nvfp4"]["weight_global_scale"],
        "morphoquant": dequantize_weight(ours["weight_codes"], ours["weight_scale"]) / ours["activation_step"],
    }
    for kind, matrix in matrices.items():
        assert matrix.shape == (linear.outputs, linear.channels), kind
        # Uniform codes also have a mean of -1/2.
        assert 0.9 < float(matrix.norm(dim=1).mean()) < 1.1, kind


def test_every_linear_takes_every_format() -> None:
    for model in MODELS:
        assert all(linear.channels % 128 == 0 and linear.outputs % 32 == 0 for linear in linears(model))


def test_rates_are_vllm_s_own_figures(tmp_path: Path) -> None:
    # As `vllm bench throughput` 0.32 writes it: 8 prompts of 512 tokens, one new token each.
    reported = {"elapsed_time": 4.0, "num_requests": 8, "total_num_tokens": 4104, "tokens_per_second": 1026.0}
    assert engine.prompt_rate(reported) == 1024.0
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"completed": 2, "failed": 0, "median_tpot_ms": 20.0}))
    assert engine.served_result(file, 2)["median_tpot_ms"] == 20.0
    with pytest.raises(RunError, match="2 of 3 requests were answered"):
        engine.served_result(file, 3)


LOG = """
INFO [default_loader.py:502] Loading weights took 1.25 seconds
INFO [auto_gptq.py:352] Using CPUWNA16LinearKernel for AutoGPTQLinearMethod
(EngineCore pid=7) INFO [gpu_model_runner.py:5150] Model loading took 1.5 GiB memory and 2.5 seconds
(EngineCore pid=7) ERROR AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'
(EngineCore pid=7) ERROR RuntimeError: Worker failed with error ''_OpNamespace' ...', please check the stack trace above
(APIServer pid=6) ERROR vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See above
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
(APIServer pid=6) WARNING This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.
"""


def test_a_log_says_which_kernels_ran_and_why_an_engine_failed() -> None:
    found = engine.read_log(LOG)
    assert found == {"kernels": ["CPUWNA16LinearKernel"], "load_s": 1.25, "device_bytes": 1.5 * 2**30}
    assert engine._reason(LOG, "?") == "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"
    assert engine._reason("nothing\nof note", "vllm serve exited with -4") == "vllm serve exited with -4"
    assert engine.read_log("MorphoQuant: the slow torch reference serves on this CPU: x")["kernels"] == [
        "torch reference"
    ]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ValueError: no such thing'; exit 2", "ValueError: no such thing"),
        ("exit 3", "vllm bench serve exited with 3"),
        ("sleep 60", "vllm bench serve took more than 1 s"),
    ],
)
def test_a_client_that_fails_is_a_reason_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    (tmp_path / "vllm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RunError) as caught:
        engine.run_vllm(["bench", "serve"], tmp_path / "log", Settings(timeout=1 if "sleep" in script else 60))
    assert str(caught.value) == reason


def test_memory_is_that_of_the_largest_process_of_the_session() -> None:
    assert memory.of_status("VmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\nRssAnon:\t 512 kB\n") == {
        "peak": 2 << 20,
        "resident": 1 << 20,
        "anonymous": 512 << 10,
    }
    # A session of its own: other tests run in this one. The small process stands for the server's front.
    held = "held = bytearray(b'x' * (1 << 27)); print('ready', flush=True); input()"
    front = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    line = [sys.executable, "-c", front]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as session:
        assert session.stdout is not None and session.stdout.readline() == b"ready\n"
        found = memory.of_session(session.pid)
        session.communicate(b"\n")
    assert found["peak"] >= found["resident"] >= found["anonymous"] > 1 << 27
    assert memory.of_session(-1) == {}
    assert memory.available() > 0


def test_threads_are_cores_of_this_process() -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    assert thread_settings(None, [0, 3], {}) == {name: "0,3"}
    assert thread_settings(1, [0, 3], {name: "0-1"}) == {name: "0"}
    assert thread_settings(None, [0, 3], {name: "0-1"}) == {name: "0-1"}
    with pytest.raises(MorphoQuantError, match="--threads 3"):
        thread_settings(3, [0, 3], {})


def test_a_model_that_does_not_fit_is_left_out_in_16_bit() -> None:
    reason = too_large("Qwen2.5-7B", "bf16", False, 16 * 10**9)
    assert reason is not None and "16 GB are available" in reason
    assert too_large("Qwen2.5-7B", "bf16", False, 64 * 10**9) is None
    assert too_large("Qwen2.5-7B", "bf16", True, 0) is None
    assert too_large("Qwen2.5-7B", "morphoquant-g32", False, 16 * 10**9) is None


def test_each_method_runs_once_a_round_and_one_that_fails_no_more() -> None:
    calls: list[str] = []
    left_out: dict[str, str] = {"w8a8": "too large"}
    rounds: list[list[dict[str, Any]]] = []

    def run(method: str) -> dict[str, Any]:
        calls.append(method)
        if method == "gptq":
            raise RunError("no kernel")
        return {"ttft_ms": 1.0, "kernels": []}

    measure_model(
        "tiny", ["bf16", "gptq", "w8a8", "morphoquant-g32"], 3, run, left_out, lambda r: rounds.append(list(r))
    )
    assert sorted(calls) == ["bf16"] * 3 + ["gptq"] + ["morphoquant-g32"] * 3
    assert left_out == {"w8a8": "too large", "gptq": "no kernel"}
    assert [len(found) for found in rounds] == [1, 2, 3]
    assert list(rounds[-1][0]) == ["bf16", "morphoquant-g32"]


def samples(decode: float, ttft: float, held: float) -> dict[str, Any]:
    return {"decode_tokens_s_8": decode, "ttft_ms": ttft, "anonymous_bytes": held, "kernels": ["XKernel"]}


ROUNDS = [
    {"bf16": samples(10, 100, 4e9), "morphoquant-g32": samples(30, 50, 1e9)},
    {"bf16": samples(20, 200, 4e9), "morphoquant-g32": samples(50, 80, 1e9)},
    {"morphoquant-g32": samples(40, 60, 1e9)},
]


def test_ratios_are_taken_within_rounds_and_greater_is_better() -> None:
    found = summarize(ROUNDS)
    ours = found["morphoquant-g32"]
    assert ours["metrics"]["decode_tokens_s_8"] == {"median": 40, "low": 30, "high": 50, "rounds": 3}
    assert ours["ratios"]["bf16"]["decode_tokens_s_8"] == {"median": 2.75, "low": 2.5, "high": 3.0, "rounds": 2}
    assert ours["ratios"]["bf16"]["ttft_ms"]["median"] == 2.25
    assert ours["ratios"]["bf16"]["anonymous_bytes"]["median"] == 4.0
    assert found["bf16"]["ratios"] == {} and ours["kernels"] == ["XKernel"]


def test_the_files_hold_what_was_measured(tmp_path: Path) -> None:
    entry = {"methods": summarize(ROUNDS), "samples": ROUNDS, "left_out": {"gptq": "no kernel"}}
    summary = {"command": "c", "machine": "m", "backend": "b", "load": 0.1, "contended": False, "rounds": 3}
    empty = {"methods": {}, "samples": [], "left_out": {"bf16": "large"}}
    summary |= {"seconds": 1.0, "models": {"tiny": entry, "Qwen2.5-7B": empty}}
    files = write(summary, tmp_path, "serve")
    assert [path.name for path in files] == ["serve.json", "serve.md", "serve.png"]
    assert json.loads(files[0].read_text()) == summary
    text = files[1].read_text()
    assert "| morphoquant-g32 | 40 (30-50) | 60 (50-80) | 1 (1-1) |" in text
    assert "| morphoquant-g32 | 2.75x (2.5-3) | 2.25x (2-2.5) | 4x (4-4) |" in text
    assert f"{len(ROUNDS)} of 3 rounds" in text
    assert "- gptq: no kernel" in text and "- bf16: large" in text


@pytest.mark.full
def test_an_engine_is_asked_by_vllm_s_own_client(work: Path) -> None:
    """MorphoQuant with the 8-bit head, from generated weights to vLLM's figures: one server, one client."""
    kind, extra = METHODS["morphoquant-g32-head8"]
    settings = Settings(
        prompts=0, short_tokens=8, output_tokens=4, sequences=(2,), arguments=("--enforce-eager",), timeout=600
    )
    scratch = work / "run"
    found = engine.measure(write_checkpoint("tiny", kind, work), settings, extra, scratch)
    assert found["decode_tokens_s_2"] > 0 and found["start_s"] > 0 and found["load_s"] >= 0
    assert found["peak_bytes"] >= found["resident_bytes"] >= found["anonymous_bytes"] > 10**8
    assert "ttft_ms" not in found and "prompt_tokens_s" not in found
    log = (scratch / "serve.log").read_text()
    if cpu.available():
        assert "MorphoQuant: lm_head in 8 bit takes 0.1 MB instead of 0.1 MB" in log
        assert "torch reference" not in found["kernels"]
