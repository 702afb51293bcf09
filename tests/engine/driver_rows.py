"""Runs vLLM engines and records the row of every token: `python -m tests.engine.driver_rows JOBS.json`.

Each job is one engine and several passes over prompts; see tests/engine/driver.py for the rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.driver import main


def _prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """Turn the JSON form of a prompt into vLLM's: media are named by files, several of a kind in a list."""
    import av
    import numpy as np
    import soundfile
    from PIL import Image

    def video(path: str) -> tuple[Any, dict[str, Any]]:
        with av.open(path) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        count = len(frames)
        return frames, {
            "fps": 4.0,
            "duration": count / 4,
            "total_num_frames": count,
            "frames_indices": list(range(count)),
        }

    loaders = {
        "image": lambda path: Image.open(path).convert("RGB"),
        "audio": lambda path: soundfile.read(path, dtype="float32"),
        "video": video,
    }
    loaded = {name: value for name, value in prompt.items() if name != "media"}
    media = {kind: [loaders[kind](path) for path in paths] for kind, paths in prompt.get("media", {}).items()}
    return loaded | ({"multi_modal_data": media} if media else {})


def run(job: dict[str, Any]) -> None:
    """Start one engine; for each pass generate, then write rows, tokens and log probabilities."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.engine import recording

    llm = LLM(job["model"], **job["engine"])
    llm.collective_rpc(recording.install)
    passes = {}
    for name, settings in job["passes"].items():
        if "swap" in settings:
            llm.collective_rpc(recording.swap_rows, args=tuple(settings["swap"]))
        sampling = SamplingParams(
            max_tokens=settings.get("max_tokens", 6),
            temperature=0,
            ignore_eos=True,
            logprobs=1,
            prompt_logprobs=0 if settings.get("prompt_logprobs") else None,
        )
        outputs = llm.generate([_prompt(prompt) for prompt in settings["prompts"]], sampling, use_tqdm=False)
        passes[name] = {
            "workers": llm.collective_rpc(recording.collect),
            "requests": [
                {
                    "prompt_token_ids": list(output.prompt_token_ids),
                    "token_ids": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens or 0,
                    "prompt_logprobs": [
                        entry[token].logprob
                        for entry, token in zip(
                            (output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:], strict=False
                        )
                    ],
                }
                for output in outputs
            ],
        }
    llm.collective_rpc(recording.stop)
    Path(job["output"]).write_text(json.dumps(passes))
    del llm
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(run)
