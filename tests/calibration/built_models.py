"""Tiny models and data that fits them, built when first asked for."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.model.source import Source, open_source
from tests.tiny_conversations import write_calibration_data
from tests.tiny_experts import build_tiny_qwen3_moe, build_tiny_qwen3_omni_moe, build_tiny_qwen3_vl_moe
from tests.tiny_media_models import build_tiny_qwen3_vl
from tests.tiny_models import (
    build_tiny_llama,
    build_tiny_omni,
    build_tiny_qwen2,
    build_tiny_qwen2_5_vl,
    build_tiny_qwen3,
)

_BUILDERS = {
    "llama": build_tiny_llama,
    "qwen2": build_tiny_qwen2,
    "qwen3": build_tiny_qwen3,
    "qwen2_5_vl": build_tiny_qwen2_5_vl,
    "omni": build_tiny_omni,
    "qwen3_vl": build_tiny_qwen3_vl,
    "qwen3_moe": build_tiny_qwen3_moe,
    "qwen3_vl_moe": build_tiny_qwen3_vl_moe,
    "qwen3_omni_moe": build_tiny_qwen3_omni_moe,
}
_KINDS = {"qwen2_5_vl": "vl", "qwen3_vl": "vl", "omni": "omni", "qwen3_vl_moe": "vl", "qwen3_omni_moe": "omni"}


class TinyModels:
    """Tiny models and calibration data that fits them, each built when first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def model(self, name: str) -> Path:
        directory = self._directory / name
        return directory if directory.exists() else _BUILDERS[name](directory)

    def data(self, name: str) -> Path:
        directory = self._directory / f"{name}-data"
        path = directory / "data.jsonl"
        return path if path.exists() else write_calibration_data(directory, _KINDS.get(name, "text"))


def with_tensors(model: Path, place: Path, tensors: Mapping[str, Tensor]) -> Source:
    """A copy of a model in one file of the folder `place`, which also holds `tensors`, by name."""
    (place / "config.json").write_bytes((model / "config.json").read_bytes())
    stored = {**load_file(model / "model.safetensors"), **tensors}
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    return open_source(place)
