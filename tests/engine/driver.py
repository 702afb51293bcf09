"""Runs vLLM engines one after another in a process of its own: `python -m tests.engine.driver JOBS.json`.

Each job names a checkpoint, the engine's settings and prompts; its results are written as JSON, and where asked for,
the tensors that went through the quantized layers as safetensors. Tests read the files: they never import vLLM.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.engine.linear_attention import linear_attention


def _prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """Turn the JSON form of a prompt into vLLM's: media are named by file."""
    import soundfile
    from PIL import Image
    from vllm.multimodal.media import MediaConnector

    loaded = dict(prompt)
    media = {}
    if "image" in prompt:
        media["image"] = Image.open(loaded.pop("image")).convert("RGB")
    if "audio" in prompt:
        media["audio"] = soundfile.read(loaded.pop("audio"), dtype="float32")
    if "video" in prompt:
        # As a server decodes it.
        content = base64.b64encode(Path(loaded.pop("video")).read_bytes()).decode()
        media["video"] = [MediaConnector().fetch_video(f"data:video/mp4;base64,{content}")]
    return loaded | ({"multi_modal_data": media} if media else {})


def _watch(model: torch.nn.Module, captured: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Note input, rows, codes and output of every quantized layer's first call; call to stop.

    Codes are those of the backend's own quantizer on the layer's prepared record.
    """
    from morphoquant_vllm import ops
    from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), MorphoQuantLinearMethod)
    }

    def before(name: str, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if f"{name}.x" in captured:
            return
        x, method = inputs[0], layer.quant_method
        rows = method.modality(layer, x)[: x.shape[0]]
        captured[f"{name}.x"], captured[f"{name}.modality"] = x.clone(), rows.clone()
        captured[f"{name}.renumbered"] = torch.tensor(method.renumbered)
        captured[f"{name}.codes"] = ops.act_quant(x, rows, method.records(layer)[1], method.backend)

    def after(name: str, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        captured.setdefault(f"{name}.y", (output[0] if isinstance(output, tuple) else output).clone())

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(before, name)))
        handles.append(layer.register_forward_hook(partial(after, name)))

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def _watch_towers(model: torch.nn.Module, seen: dict[str, list[list[float]]]) -> None:
    """Note the outputs of the image and the audio tower for their first medium."""

    def after(name: str, tower: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        # The audio tower is transformers' own.
        tensor = getattr(output, "last_hidden_state", output)
        seen.setdefault(name, tensor.float().flatten(0, -2).tolist())

    for name in ("visual", "audio_tower"):
        tower = getattr(model, name, None)
        if tower is not None:
            tower.register_forward_hook(partial(after, name))


def _linear_methods(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def _counted(llm: Any) -> dict[str, list[list[int]]]:
    """Counts of escapes by checkpoint layer, if the engine counts them."""
    watch = llm.llm_engine.model_executor.driver_worker.vllm_config.quant_config.escape_watch
    return {} if watch is None else {watch.layers[n].stored: watch.copied[i].tolist() for n, i in watch.chosen.items()}


def run(job: dict[str, Any]) -> None:
    """Start one engine, generate, write the requested results."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    result: dict[str, Any] = {}
    try:
        llm = LLM(job["model"], **job["engine"])
    except Exception as error:
        # Whatever the engine raises is the result: the test looks at its message.
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        result["error"] = [f"{type(cause).__name__}: {cause}" for cause in causes]
        Path(job["output"]).write_text(json.dumps(result))
        return
    captured: dict[str, torch.Tensor] = {}
    in_process = job["engine"].get("tensor_parallel_size", 1) == 1
    stop: Callable[[], None] | None = None
    result["compilation"] = llm.llm_engine.vllm_config.compilation_config.mode.name
    if in_process:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        result["methods"] = _linear_methods(model)
        stop = _watch(model, captured) if job.get("capture") else None
        result["towers"] = {}
        _watch_towers(model, result["towers"])
    sampling = SamplingParams(max_tokens=job.get("max_tokens", 8), temperature=0, logprobs=1, prompt_logprobs=0)
    outputs = llm.generate([_prompt(prompt) for prompt in job["prompts"]], sampling, use_tqdm=False)
    if "additional_config" in job["engine"]:
        result["counted"] = _counted(llm)
    if "sleep" in job:
        llm.sleep(job["sleep"])
        if job["sleep"] == 2:
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
        else:
            llm.wake_up()
        again = llm.generate([_prompt(prompt) for prompt in job["prompts"]], sampling, use_tqdm=False)
        result["after_sleep"] = [list(output.outputs[0].token_ids) for output in again]
    if stop is not None:
        stop()
    result["requests"] = [
        {
            "prompt_token_ids": list(output.prompt_token_ids),
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": [
                entry[token].logprob
                for entry, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
            ],
            "prompt_logprobs": [
                entry[token].logprob
                for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            ],
        }
        for output in outputs
    ]
    if "speculative_config" in job["engine"]:
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        result["drafted"] = counts["vllm:spec_decode_num_draft_tokens"]
        result["accepted"] = counts["vllm:spec_decode_num_accepted_tokens"]
    if captured:
        save_file({name: tensor.contiguous() for name, tensor in captured.items()}, job["capture"])
    Path(job["output"]).write_text(json.dumps(result))
    del llm
    cleanup_dist_env_and_memory()


def main(run: Callable[[dict[str, Any]], None] = run) -> None:
    """Run every job of the file that the command line names."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with linear_attention(job.get("linear_attention")):
            run(job)


if __name__ == "__main__":
    main()
