"""Asks vLLM-Omni's thinker, and builds every stage: `python -m tests.engine.driver_omni JOBS.json`.

vLLM-Omni serves on no CPU. So vLLM's own engine serves vLLM-Omni's class of the thinker here, by a job of
`tests.engine.driver`. All stages are then configured by vLLM-Omni and loaded from the checkpoint. The vocoder of
Qwen2.5-Omni makes a sound of 40 codes; the other stages are not run.
"""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.engine import driver

# vLLM-Omni's folder of each model.
FOLDERS = {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni_moe": "qwen3_omni"}


def _fit_tiny_models() -> None:
    """Let vLLM-Omni's classes take tiny models and vLLM's runner, neither of which is about quantization."""
    from vllm_omni.model_executor.models.qwen2_5_omni import qwen2_5_omni
    from vllm_omni.model_executor.models.qwen3_omni import qwen3_omni

    dense = qwen2_5_omni.Qwen2_5OmniForConditionalGeneration
    # vLLM-Omni's runner passes more arguments than vLLM's, and takes other results. The thinker inside is as in vLLM.
    dense.get_mrope_input_positions = lambda model, *arguments, **_: model.thinker.get_mrope_input_positions(*arguments)
    forward = dense.forward
    dense.forward = lambda model, *arguments, **named: forward(model, *arguments, **named).text_hidden_states
    # Both classes have ids of the published vocabularies in their code.
    dense._init_special_tokens_embeddings = lambda _: {"thinker_embedding.weight", "talker_embedding.weight"}
    qwen3_omni.Qwen3OmniMoeForConditionalGeneration._get_talker_suppressed_tokens = lambda _: torch.zeros(1)


def _factory(checkpoint: Path) -> dict[str, Any]:
    """The config that vLLM-Omni's factory makes of a checkpoint's quantization_config."""
    from vllm_omni.quantization import build_quant_config

    made = build_quant_config(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    return _described(made)


def _described(config: Any) -> dict[str, Any]:
    return {"class": type(config).__name__, "layers": sorted(config.layers), "experts": sorted(config.experts)}


def _stages(checkpoint: Path) -> dict[str, Any]:
    """Config and methods of each stage that vLLM-Omni lists for a model, loaded from the checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader import get_model
    from vllm_omni.engine.arg_utils import OmniEngineArgs

    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    module = import_module(f"vllm_omni.model_executor.models.{FOLDERS[model_type]}.pipeline")
    pipeline = {"qwen2_5_omni": "QWEN2_5_OMNI_PIPELINE", "qwen3_omni_moe": "QWEN3_OMNI_PIPELINE"}[model_type]
    found: dict[str, Any] = {}
    store = tempfile.mkdtemp()
    for stage in getattr(module, pipeline).stages:
        settings = OmniEngineArgs(
            model=str(checkpoint),
            model_stage=stage.model_stage,
            model_arch=stage.model_arch or getattr(module, pipeline).model_arch,
            hf_config_name=stage.hf_config_name,
            engine_output_type=stage.engine_output_type,
            # Otherwise the platform names a worker.
            worker_cls="auto",
            enforce_eager=True,
            # The vocoder of Qwen2.5-Omni computes in float32 on a CPU.
            dtype="float32",
            max_model_len=512,
        ).create_engine_config()
        with set_current_vllm_config(settings):
            init_distributed_environment(1, 0, f"file://{store}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            model = get_model(vllm_config=settings)
        found[stage.model_stage] = {
            "config": _described(settings.quant_config),
            "methods": driver._linear_methods(model),
            "parameters": sum(1 for _ in model.parameters()),
        }
        if stage.model_stage == "code2wav" and hasattr(model, "token2wav"):
            with torch.inference_mode():
                found[stage.model_stage]["sound"] = model.generate_audio(torch.arange(40), "Chelsie").tolist()
    return found


def run(job: dict[str, Any]) -> None:
    """Serve the thinker as `tests.engine.driver` does, then build the stages."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _fit_tiny_models()
    driver.run(job)
    checkpoint = Path(job["model"])
    Path(job["stages"]).write_text(json.dumps({"factory": _factory(checkpoint), "stages": _stages(checkpoint)}))


if __name__ == "__main__":
    driver.main(run)
