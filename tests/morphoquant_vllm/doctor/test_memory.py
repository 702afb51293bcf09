"""A checkpoint's need against the free memory of a machine, of a container and of a GPU."""

import json
from pathlib import Path

import pytest

from morphoquant_vllm.doctor import memory
from morphoquant_vllm.errors import MorphoQuantError
from tests.checkpoints import write_random_checkpoint


def meminfo(folder: Path, kib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal:       {16 << 20} kB\nMemFree:   1 kB\nMemAvailable:   {kib} kB\n")
    return path


def test_a_container_has_less_than_the_machine(tmp_path: Path) -> None:
    info = meminfo(tmp_path, 8 << 20)
    assert memory.cpu_memory(info, tmp_path) == (16 << 30, 8 << 30)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(str(1 << 30))
    assert memory.cpu_memory(info, tmp_path) == (16 << 30, 8 << 30)
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    assert memory.cpu_memory(info, tmp_path) == (4 << 30, 3 << 30)


@pytest.mark.parametrize(
    ("free", "space", "state", "words"),
    [
        (15 << 30, None, "ok", "92% of the memory"),
        (14 << 30, None, "note", "VLLM_CPU_KVCACHE_SPACE=4 vllm serve"),
        (5 << 30, None, "note", "VLLM_CPU_KVCACHE_SPACE=1 vllm serve"),
        (0, None, "note", "VLLM_CPU_KVCACHE_SPACE=1 vllm serve"),
        (14 << 30, "0", "note", "VLLM_CPU_KVCACHE_SPACE=4 vllm serve"),
        (14 << 30, "10", "ok", "10 GiB"),
        (14 << 30, "2.5", "problem", "no whole number of GiB"),
        (14 << 30, "", "problem", "no whole number of GiB"),
    ],
)
def test_vllm_does_not_start_by_itself_if_memory_is_in_use(
    monkeypatch: pytest.MonkeyPatch, free: int, space: str | None, state: str, words: str
) -> None:
    monkeypatch.setattr(memory, "cpu_memory", lambda: (16 << 30, free))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if space is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    (finding,) = memory.kv_cache()
    assert finding.state == state and words in finding.text + finding.remedy


def test_a_checkpoint_is_read_from_its_files(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model")
    model = memory.read_model(tmp_path / "model")
    files = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert model.is_quantized and model.weights == files
    with pytest.raises(MorphoQuantError, match="none"):
        memory.read_model(tmp_path / "none")


@pytest.mark.parametrize("settings", [None, {"quant_method": "fp8"}, []])
def test_a_source_of_calibration_is_no_checkpoint(tmp_path: Path, settings: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    model = memory.read_model(tmp_path)
    assert not model.is_quantized and model.weights == 5


def test_several_gpus_and_sources_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = memory.Model(Path("some"), 30 << 30, frozenset(), True)
    (finding,) = memory.serving(checkpoint, 24 << 30, 4)
    assert finding.state == "note" and "--tensor-parallel-size 2 or more" in finding.remedy
    (finding,) = memory.serving(checkpoint, 7 << 30, 4)
    assert finding.state == "problem"
    monkeypatch.setattr(memory, "cpu_memory", lambda: (16 << 30, 8 << 30))
    (finding,) = memory.serving(memory.Model(Path("some"), 30 << 30, frozenset(), False), None)
    assert finding.state == "note" and "cannot serve it in 16 bit" in finding.remedy


def test_eight_bit_weights_are_no_problem_on_a_cpu_alone(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "wide", eight_bit=["model.layers.0.mlp.down_proj"])
    wide = memory.read_model(tmp_path / "wide")
    states = {has_gpu: next(memory.weight_bits(wide, has_gpu=has_gpu)) for has_gpu in (False, True)}
    assert [states[has_gpu].state for has_gpu in (False, True)] == ["ok", "problem"]
    assert "8-bit weights in 1 layers are not served on GPUs yet" in states[True].text
    write_random_checkpoint(tmp_path / "plain")
    assert not list(memory.weight_bits(memory.read_model(tmp_path / "plain"), has_gpu=True))


@pytest.mark.parametrize(
    ("gpu_bytes", "weights", "state"),
    [(8 << 30, 7 << 30, "ok"), (8 << 30, 9 << 30, "problem"), (None, 1 << 30, "ok"), (None, 7 << 30, "problem")],
)
def test_weights_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, gpu_bytes: int | None, weights: int, state: str
) -> None:
    monkeypatch.setattr(memory, "cpu_memory", lambda: (16 << 30, 8 << 30))
    model = memory.Model(Path("some"), weights, frozenset(), True)
    (finding,) = memory.serving(model, gpu_bytes)
    assert finding.state == state
    assert "8.00 GiB" in finding.text
