"""Loads checkpoints one after another with vLLM's own loader and says what memory the last one took.

`python -m tests.engine.load_memory FIRST LAST`: a line of JSON with this process's anonymous memory before LAST was
loaded and after. FIRST brings in modules and kernels, whose memory is not the weights'.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.serve.memory import of_status


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    gc.collect()
    return of_status(Path("/proc/self/status").read_text())["anonymous"]


def load(checkpoint: str) -> torch.nn.Module:
    """The model, as a worker on a CPU loads it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    arguments = EngineArgs(model=checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=256)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
        return get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)


def main() -> None:
    """Load both, keep the second."""
    # As vLLM's worker on a CPU has it: there is no accelerator to ask.
    torch.accelerator.empty_cache = lambda: None  # type: ignore[method-assign]
    load(sys.argv[1])
    before = anonymous()
    model = load(sys.argv[2])
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    print(json.dumps({"before": before, "after": anonymous(), "tensors": held}), flush=True)


if __name__ == "__main__":
    main()
