"""Runs vLLM engines compiled as GPUs compile them: `python -m tests.engine.driver_fusion JOBS.json`.

On a CPU vLLM traces a model whole and spells norms out. Here it is made to go its way for GPUs: a graph for each piece
between attentions, norms as one operator, its own passes and ours over each, then lowering. The CPU's backend gets the
ops of fused layers in two steps, so that the passes take its layers. The result holds how many norms and products of
silu(gate) * up they fused.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.engine import driver


def _compile_as_gpus_do() -> None:
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    before = CpuPlatform.check_and_update_config.__func__

    def keep(platform: type, config: Any) -> None:
        settings = config.compilation_config
        mode = settings.mode
        before(platform, config)
        if mode == CompilationMode.VLLM_COMPILE:
            settings.mode, settings.ir_enable_torch_wrap = mode, True
            # Set by vLLM where it captures CUDA graphs.
            settings.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(keep)
    # It names operators of CUDA's build. Without it the compiler copies what an operator writes.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def _let_the_cpu_fuse() -> None:
    from morphoquant_vllm import backends

    def two_steps(gate_up: torch.Tensor, *arguments: Any) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return backends.BACKENDS["cpu"].linear(torch.nn.functional.silu(gate) * up, *arguments)

    backends.BACKENDS["cpu"] = replace(backends.BACKENDS["cpu"], silu_mul_linear=two_steps)


def run(job: dict[str, Any]) -> None:
    """One engine, with MORPHOQUANT_FUSION as the job says, and what its passes matched."""
    os.environ["MORPHOQUANT_FUSION"] = job["fusion"]
    from morphoquant_vllm.plugin.fusion import Fusions

    matched = {"norms": 0, "silu_mul": 0}
    passes = Fusions.__call__

    def counting(self: Fusions, graph: torch.fx.Graph) -> None:
        passes(self, graph)
        matched["norms"] += self.norm.matched
        matched["silu_mul"] += self.silu_mul.matched

    Fusions.__call__ = counting
    try:
        driver.run(job)
    finally:
        Fusions.__call__ = passes
    output = Path(job["output"])
    output.write_text(json.dumps(json.loads(output.read_text()) | {"matched": matched}))


if __name__ == "__main__":
    _compile_as_gpus_do()
    _let_the_cpu_fuse()
    driver.main(run)
