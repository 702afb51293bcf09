"""`python -m morphoquant_vllm.names`: every layer is found in vLLM's model, or the first missing one is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from morphoquant_vllm import names
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from tests.engine.conftest import REPOSITORY
from tests.tiny_decoders import build_tiny_decoder
from tests.tiny_experts import build_tiny_qwen3_moe


def planned(directory: Path, *layers: str) -> str:
    """A file with a planned quantization_config: layers of K = 128 and N = 128."""
    spec = QuantizationSpec({name: LayerSpec(128, 128, 32, "row", name) for name in layers})
    file = directory / "planned.json"
    file.write_text(json.dumps(spec.to_dict()))
    return str(file)


def run(model: Path, file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "morphoquant_vllm.names", str(model), "--layers", file]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.full
def test_a_layer_that_vllm_would_not_find_is_named(tmp_path: Path) -> None:
    model = build_tiny_decoder("stablelm", tmp_path / "model")
    found = "model.layers.0.self_attn.o_proj"
    done = run(model, planned(tmp_path, found))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{model}: vLLM's StablelmForCausalLM has all 1 layers"
    done = run(model, planned(tmp_path, found, "model.layers.1.self_attn.out_proj"))
    assert done.returncode == names.MISSING
    assert done.stderr.splitlines()[-1] == (
        "model.layers.1.self_attn.out_proj: vLLM's StablelmForCausalLM has no linear of this name that can be "
        "quantized (1 of 2 are missing); leave it in 16 bit: --ignore '*.out_proj'"
    )


@pytest.mark.slow
@pytest.mark.full
def test_a_bias_that_vllm_would_not_add_is_named(tmp_path: Path) -> None:
    model, name = build_tiny_decoder("stablelm", tmp_path / "model"), "model.layers.0.self_attn.o_proj"
    file = tmp_path / "planned.json"
    file.write_text(json.dumps(QuantizationSpec({name: LayerSpec(128, 128, 32, "row", name, bias=True)}).to_dict()))
    done = run(model, str(file))
    assert done.returncode == names.MISSING
    assert done.stderr.splitlines()[-1] == (
        f"{name}: vLLM's StablelmForCausalLM has no bias here, the weights a bias; it cannot serve them"
    )


@pytest.mark.slow
@pytest.mark.full
def test_a_list_of_experts_that_vllm_would_not_find_is_named(tmp_path: Path) -> None:
    model = build_tiny_qwen3_moe(tmp_path / "model")
    file, found = tmp_path / "planned.json", "model.layers.0.mlp.experts"
    experts = {name: ExpertsSpec(4, 128, 64, 32) for name in (found, "model.layers.1.experts")}
    file.write_text(json.dumps(QuantizationSpec({}, experts={found: experts[found]}).to_dict()))
    done = run(model, str(file))
    assert done.returncode == 0, done.stderr
    file.write_text(json.dumps(QuantizationSpec({}, experts=experts).to_dict()))
    done = run(model, str(file))
    assert done.returncode == names.MISSING
    assert "model.layers.1.experts: vLLM's Qwen3MoeForCausalLM has no list of experts of this name" in done.stderr


@pytest.mark.parametrize(
    ("problem", "status", "line"),
    [
        (MorphoQuantError("a: is missing"), names.MISSING, "a: is missing\n"),
        (ValueError("no\n  such class"), names.NOT_BUILT, "m: vLLM cannot build this model (no such class)\n"),
    ],
)
def test_each_end_has_one_line_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, problem, status: int, line: str
) -> None:
    def fail(directory: Path, spec: QuantizationSpec) -> str:
        raise problem

    monkeypatch.setattr(names, "_check", fail)
    assert names.main(["m", "--layers", planned(tmp_path, "a")]) == status
    assert capsys.readouterr().err == line


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "planned.json"
    file.write_text("{")
    assert names.main(["m", "--layers", str(file)]) == names.MISSING
    assert capsys.readouterr().err.startswith(f"--layers: {file} cannot be read (")
    assert names.main([str(tmp_path)]) == names.MISSING
    assert str(tmp_path) in capsys.readouterr().err
