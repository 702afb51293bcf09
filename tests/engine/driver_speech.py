"""Lets vLLM-Omni speak one sentence on a GPU: `python -m tests.engine.driver_speech DIRECTORY PROMPT OUTPUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

# vLLM-Omni spreads the stages over two GPUs. Here one has all three; the vocoder computes in float32.
STAGES = {
    "0": {"devices": "0", "gpu_memory_utilization": 0.2, "max_model_len": 1024},
    "1": {"devices": "0", "gpu_memory_utilization": 0.2, "max_model_len": 1024},
    "2": {"devices": "0", "gpu_memory_utilization": 0.2, "max_model_len": 1024, "dtype": "float32"},
}
# Tokens of the thinker and codes of the talker: a model of random weights would go on for ever.
LONGEST = {0: 16, 1: 64}


def main(directory: str, prompt: str, output: str) -> None:
    """Ask once; write the text and the samples of the answer."""
    from vllm_omni import Omni

    omni = Omni(model=directory, stage_overrides=STAGES)
    sampling = omni.default_sampling_params_list
    for stage, tokens in LONGEST.items():
        sampling[stage].max_tokens = tokens
    found: dict[str, object] = {}
    for result in omni.generate([{"prompt": prompt}], sampling):
        if result.final_output_type == "text":
            found["text"] = result.outputs[0].text
        else:
            sound = result.multimodal_output["audio"]
            parts = sound if isinstance(sound, list) else [sound]
            found["samples"] = torch.cat([torch.as_tensor(part).flatten().float().cpu() for part in parts]).tolist()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
