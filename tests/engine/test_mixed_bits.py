"""An engine on a checkpoint with 4-bit and 8-bit weights and a linear that stays in 16 bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.calibration.mixed import calibrate_mixed
from tests.engine.conftest import ENGINE, TEXT_PROMPT, Engines
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data

pytestmark = pytest.mark.full

# Another order of float32 sums, as in test_matrix.
TOLERANCE = 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_served_logprobs_are_the_reference_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    source = tiny_models.build_tiny_llama(tmp_path / "source")
    data = write_calibration_data(tmp_path / "data", "text")
    calibrate_mixed(source, data, tmp_path / "mixed", monkeypatch, "model.layers")
    engines = Engines(tmp_path)
    engine = {**ENGINE, "tensor_parallel_size": ranks}
    job = {"model": str(tmp_path / "mixed"), "prompts": [{"prompt_token_ids": TEXT_PROMPT}], "engine": engine}
    engines.run({"mixed": job}, timeout=1800)
    result = engines.results["mixed"]
    assert "error" not in result, result["error"]
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = swap_linears(plain, Checkpoint(tmp_path / "mixed"))
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([TEXT_PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()
    found = torch.tensor(result["requests"][0]["prompt_logprobs"])
    largest = float((found - expected).abs().max())
    print(f"{ranks} ranks: largest difference of log-probabilities {largest}")
    assert largest < TOLERANCE
    if ranks > 1:
        # The layers are in other processes.
        return
    methods = result["methods"]
    assert methods["model.layers.1.self_attn.o_proj"] == "UnquantizedLinearMethod"
    assert methods["model.layers.0.self_attn.qkv_proj"] == "MorphoQuantLinearMethod"
