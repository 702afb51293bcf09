"""Published layouts without their weights: what planning and formulas need."""

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.calibrate.model.generate import meta_tensors
from benchmarks.calibrate.model.layouts import layout_config
from calibration.model.source import TensorInfo


@cache
def layout(name: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Config and tensors of a published layout, without weights."""
    dtypes = {"torch.bfloat16": "BF16", "torch.float32": "F32"}
    tensors = {
        tensor: TensorInfo(Path("model.safetensors"), dtypes[str(value.dtype)], tuple(value.shape))
        for tensor, value in meta_tensors(name).items()
    }
    return layout_config(name), tensors
