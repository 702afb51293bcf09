"""Another quantizer's weights, handed back by a process of its own; a stand-in takes its place."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import job as jobs
from benchmarks.accuracy.methods import known_methods
from benchmarks.accuracy.peers import environment
from benchmarks.accuracy.settings import Settings
from benchmarks.models import decoder
from morphoquant_vllm.errors import MorphoQuantError
from tests.tiny_models import build_tiny_llama

NAME = "w4a16-auto-round-g32"
# A method of each quantizer.
NAMES = {"auto-round": NAME, "gptqmodel": "w4a16-gptqmodel-g32"}
# Rounds every weight of the decoder to whole numbers, and fails if it sees this project's environment.
STAND_IN = """
import json, os, sys
from safetensors.torch import load_file, save_file
job = json.load(open(sys.argv[1]))
assert "PYTHONPATH" not in os.environ
assert (job["version"], job["options"]) in (("0.16.1", {"iters": 200}), ("7.7.0", {}), ("1", {}))
assert job["group_size"] == 32 and len(job["samples"][0]) == 16
weights = load_file(job["model"] + "/model.safetensors")
save_file({n.removesuffix(".weight"): w.float().mul(100).round().div(100)
           for n, w in weights.items() if "proj" in n}, job["output"])
"""
REQUEST = environment.Request("1", 32, 0, {}, [[1] * 16])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_llama(tmp_path / "llama")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(environment, "SCRIPTS", dict.fromkeys(NAMES, script))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return script


def job_of(model: Path, work: Path, peers: dict[str, Path]) -> jobs.Job:
    text = work.parent / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(100)))

    def evaluate(loaded: torch.nn.Module, name: str) -> dict[str, object]:
        weight = loaded.get_submodule("model.layers.1.mlp.up_proj").weight.detach()
        return {"losses": [float((weight * 100 - (weight * 100).round()).abs().max())], "tokens": 1}

    settings = Settings(work=work, window_tokens=16, peers=peers)
    return jobs.Job("language", settings, model, [text], 2, {"code": "0"}, dict, evaluate, ("code",), ("code",))


@pytest.mark.parametrize(("tool", "name"), NAMES.items())
def test_the_weights_that_come_back_are_evaluated_and_made_once(
    tool: str, name: str, model: Path, tmp_path: Path, stand_in: Path
) -> None:
    job = job_of(model, tmp_path / "work", {tool: Path(sys.executable)})
    plain = decoder.load(model).get_submodule("model.layers.1.mlp.up_proj").weight.detach() * 100
    assert float((plain - plain.round()).abs().max()) > 0.1
    jobs.run(job, name, ["code"])
    found = jobs.load(job, name, "code")
    assert found is not None and found["losses"][0] < 1e-4

    (weights,) = (tmp_path / "work" / "peers").glob("*.safetensors")
    before = weights.stat().st_mtime_ns
    for result in (tmp_path / "work" / "results").iterdir():
        result.unlink()
    jobs.run(job, name, ["code"])
    assert weights.stat().st_mtime_ns == before and jobs.load(job, name, "code") == found


@pytest.mark.parametrize(("tool", "name"), NAMES.items())
def test_without_its_environment_a_peer_is_left_out_unless_its_results_are_there(
    tool: str, name: str, model: Path, tmp_path: Path, stand_in: Path
) -> None:
    assert name in known_methods("language") and name not in known_methods("omni")
    bare = job_of(model, tmp_path / "work", {})
    remedy = f"give --peer {tool}=PYTHON, the python of an environment with it"
    assert jobs.left_out(bare, ["16bit", name], ["code"]) == {name: remedy}
    equipped = job_of(model, tmp_path / "work", {tool: Path(sys.executable)})
    assert jobs.left_out(equipped, [name], ["code"]) == {}
    jobs.run(equipped, name, ["code"])
    assert jobs.left_out(bare, [name], ["code"]) == {}


def test_a_failure_names_the_log_and_leaves_no_weights(model: Path, tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text("import sys; sys.exit('auto-round 1 is wanted; 2 is installed')")
    output = tmp_path / "weights.safetensors"
    with pytest.raises(MorphoQuantError, match=r"status 1; see .*weights\.log: auto-round 1 is wanted; 2 is installed"):
        environment.write_weights(Path(sys.executable), "auto-round", model, REQUEST, output)
    assert not output.exists()
    assert json.loads(output.with_suffix(".json").read_text())["version"] == "1"


def test_weights_of_other_linears_are_refused(model: Path, tmp_path: Path, stand_in: Path) -> None:
    output = tmp_path / "weights.safetensors"
    environment.write_weights(Path(sys.executable), "auto-round", model, REQUEST, output)
    with pytest.raises(MorphoQuantError, match="not those of the decoder"):
        environment.put_weights(decoder.load(model), output, ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("awq=/bin/sh", "--peer awq=/bin/sh: not TOOL=PYTHON with one of the tools auto-round, gptqmodel"),
        ("auto-round", "not TOOL=PYTHON"),
        ("gptqmodel=/no/python", "no such file; give the python of an environment with gptqmodel"),
    ],
)
def test_environments_are_named_by_tool(given: str, message: str) -> None:
    assert environment.parse_environments([f"auto-round={sys.executable}"]) == {"auto-round": Path(sys.executable)}
    with pytest.raises(MorphoQuantError, match=message):
        environment.parse_environments([given])
