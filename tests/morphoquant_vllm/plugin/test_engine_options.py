"""Options of vLLM that would load weights without a check, or quantize them once more."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import LoadConfig

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.engine_options import refuse_online, refuse_unchecked_loading


def engine(load_format: str = "auto", **model: Any) -> Any:
    settings = {"model": "/models/x", "model_weights": "", **model}
    return SimpleNamespace(
        model_config=SimpleNamespace(**settings), load_config=LoadConfig(load_format=load_format, device="cpu")
    )


@pytest.mark.parametrize(("load_format", "files"), [("pt", r"\*.pt"), ("npcache", r"\*.bin")])
def test_files_that_were_not_checked_are_refused(load_format: str, files: str) -> None:
    with pytest.raises(MorphoQuantError, match=f"--load-format {load_format}: reads {files} files, which are not"):
        refuse_unchecked_loading(engine(load_format))


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "dummy", "sharded_state", "runai_streamer"])
def test_loaders_that_tell_what_they_loaded_are_taken(load_format: str) -> None:
    refuse_unchecked_loading(engine(load_format))
    refuse_unchecked_loading(None)
    refuse_unchecked_loading(SimpleNamespace(model_config=None))  # type: ignore[arg-type]


def test_a_loader_that_does_not_is_refused_by_its_name() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("silent")
    class Silent(BaseModelLoader):
        def download_model(self, model_config: Any) -> None: ...
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None: ...

    with pytest.raises(MorphoQuantError, match=r"--load-format silent: its loader does not say.*--load-format auto"):
        refuse_unchecked_loading(engine("silent"))


def test_weights_of_another_place_than_the_checked_one_are_refused() -> None:
    refuse_unchecked_loading(engine(model_weights="/models/x"))
    with pytest.raises(MorphoQuantError, match=r"s3://bucket/y: weights are checked in the directory of config.json"):
        refuse_unchecked_loading(engine(model_weights="s3://bucket/y"))


def test_a_quantized_layer_is_not_quantized_once_more() -> None:
    layer = torch.nn.Linear(2, 2)
    online = SimpleNamespace(
        packed_modules_mapping={}, resolve_quant_method_cls=lambda kind, name: kind if name == "a.o_proj" else None
    )
    quantization: Any = SimpleNamespace(online_quantization_config=online, packed_modules_mapping={"qkv": ["q"]})
    refuse_online(quantization, layer, "a.down_proj")
    assert online.packed_modules_mapping == {"qkv": ["q"]}
    with pytest.raises(MorphoQuantError, match=r"--quantization-config: a.o_proj is quantized already.*`ignore`"):
        refuse_online(quantization, layer, "a.o_proj")
    for without in (SimpleNamespace(), SimpleNamespace(online_quantization_config=None)):
        refuse_online(without, layer, "a.o_proj")  # type: ignore[arg-type]
