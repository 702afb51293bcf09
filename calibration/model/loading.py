"""Loads the source model without its decoder blocks, and makes it without weights; block_loader loads the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from calibration.model.architectures import Architecture
from calibration.model.experts import CHOSEN
from calibration.model.head_tensor import is_head
from calibration.model.run_config import prepare_run
from calibration.model.source import Source
from calibration.model.ties import check_ties
from calibration.processes import ONE, Processes
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError

# Errors that transformers raises for a config with wrong types or sizes.
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)

# Sizes of a decoder that a config.json may leave to the defaults of transformers' class.
SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size"),
    *("hidden_act", CHOSEN),
)


def choose_device(name: str, processes: Processes = ONE) -> torch.device:
    """The device of a recipe; "auto" is cuda if available. With several processes, each takes a different GPU.

    MorphoQuantError if torch does not support the device, or if there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch built without CUDA reports it as an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise MorphoQuantError(f"device = '{name}' is not usable here; use cpu, or leave it at auto") from error
    if device.type not in ("cpu", "cuda"):
        raise MorphoQuantError(f"device = '{name}' is not supported; use cpu or cuda")
    if device.type == "cpu" or processes.size == 1:
        return device
    if device.index is not None:
        raise MorphoQuantError(f"device = '{name}' is one GPU, for {processes.size} processes; use cuda")
    if processes.local_size > torch.cuda.device_count():
        raise MorphoQuantError(
            f"{processes.local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
            "start one for each GPU"
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def empty_model(architecture: Architecture, source: Source, recipe: Recipe) -> Any:
    """The source model on the meta device, without weights; MorphoQuantError if transformers refuses the config."""
    with _explain_loading_errors(architecture, source):
        model_class = _model_class(architecture, source)
        config = _read_config(model_class, source)
        with torch.device("meta"):
            return model_class._from_config(config, dtype=getattr(torch, recipe.dtype)).eval()


def decoder_sizes(architecture: Architecture, source: Source) -> dict[str, Any]:
    """Those of SIZES that transformers reads for the decoder; MorphoQuantError if it refuses the config."""
    with _explain_loading_errors(architecture, source):
        text = _read_config(_model_class(architecture, source), source).get_text_config()
    return {name: getattr(text, name) for name in SIZES if getattr(text, name, None) is not None}


def _model_class(architecture: Architecture, source: Source) -> Any:
    """transformers' class; or that of the model's directory, whose code then runs."""
    if architecture.remote_code:
        return get_class_from_dynamic_module(architecture.remote_code, str(source.directory), local_files_only=True)
    return getattr(transformers, architecture.model_class)


def _read_config(model_class: Any, source: Source) -> Any:
    """transformers' config of the source model, without settings of quantization: it would quantize the model."""
    config = model_class.config_class.from_pretrained(
        str(source.directory), local_files_only=True, trust_remote_code=False
    )
    parts = [config]
    while parts:
        part = parts.pop()
        vars(part).pop("quantization_config", None)
        parts += [getattr(part, name) for name in part.sub_configs if getattr(part, name, None) is not None]
    return prepare_run(config)


def load_front(
    architecture: Architecture,
    source: Source,
    recipe: Recipe,
    *,
    stream_towers: bool = False,
    device: torch.device | None = None,
) -> Any:
    """The source model without the weights of its decoder blocks and lm_head: embedding, towers, final norm.

    With `stream_towers` the towers' weights stay in their files too, and each module reads its weights when it runs.
    That is slower and needs almost no memory; towers in FP8 are always in memory. `device` None means the recipe's.
    Raises MorphoQuantError if transformers cannot load the model, or if any weight is missing, including the blocks'.
    """
    empty = empty_model(architecture, source, recipe)
    scaled = _scaled_parameters(architecture, source, empty)
    stream_towers = stream_towers and not scaled
    absent = [architecture.block_module, *(architecture.towers if stream_towers else ())]
    if "lm_head.weight" not in empty.all_tied_weights_keys:
        absent.append("lm_head")
    with _explain_loading_errors(architecture, source):
        model_class = _model_class(architecture, source)
        config = _read_config(model_class, source)
    blocks = empty.get_submodule(architecture.block_module)
    merged = any(parameter.dim() > 2 for parameter in blocks.parameters())
    if merged:
        # transformers would convert the experts of all blocks and write them to disk again.
        decoder_config = _decoder_config(config, len(blocks))
        decoder_config.num_hidden_layers = 0
    with _explain_loading_errors(architecture, source):
        places = _places(empty, absent, str(device or choose_device(recipe.device)))
        model = _read_weights(model_class, source, config, getattr(torch, recipe.dtype), places)
    check_ties(source, empty.all_tied_weights_keys, model.all_tied_weights_keys)
    if merged:
        _decoder_config(model.config, 0).num_hidden_layers = len(blocks)
        model.set_submodule(architecture.block_module, blocks)
    with torch.no_grad():
        for name, stored in scaled.items():
            model.get_parameter(name).copy_(source.load(stored))
    # The blocks do not run here, so accelerate's hooks that read their weights are removed.
    remove_hook_from_module(model.get_submodule(architecture.block_module), recurse=True)
    return model.eval()


def _read_weights(model_class: Any, source: Source, config: Any, dtype: torch.dtype, places: dict[str, str]) -> Any:
    """The model of the class with its weights by the device map `places`; MorphoQuantError if the files lack one."""
    model, loading = model_class.from_pretrained(
        str(source.directory),
        config=config,
        dtype=dtype,
        device_map=places,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        raise MorphoQuantError(
            f"{source.directory}: the weights lack {min(loading['missing_keys'])}; download the model again"
        )
    return model


def _decoder_config(config: Any, blocks: int) -> Any:
    """The part of transformers' config that counts the `blocks` of the decoder."""
    return config if getattr(config, "num_hidden_layers", None) == blocks else config.get_text_config()


def _scaled_parameters(architecture: Architecture, source: Source, model: nn.Module) -> dict[str, str]:
    """FP8 weights outside the decoder blocks and lm_head: names in the files by the model's names.

    transformers would read them without their scales. Raises MorphoQuantError for one without a place in the model.
    """
    found = {}
    parameters = {name for name, _ in model.named_parameters()}
    blocks, start = tuple(f"{prefix}." for prefix in architecture.block_prefixes), architecture.model_prefix
    for stored, info in source.tensors.items():
        if info.scale is None or stored.startswith(blocks) or not stored.startswith(start) or is_head(stored):
            continue
        names = [stored.removeprefix(architecture.model_prefix)]
        names += [
            f"{tower}.{stored.removeprefix(prefix)}"
            for prefix in architecture.tower_prefixes
            for tower in architecture.towers
            if stored.startswith(prefix) and prefix.endswith(f"{tower.rpartition('.')[2]}.")
        ]
        name = next((name for name in names if name in parameters), None)
        if name is None:
            raise MorphoQuantError(f"{source.directory}: {stored} is FP8 and unknown; download the 16-bit original")
        found[name] = stored
    return found


def _places(model: nn.Module, absent: Sequence[str], device: str, prefix: str = "") -> dict[str, str]:
    """A device map: the modules `absent` stay in their files ("disk" for accelerate), all others are loaded.

    A module that contains an absent one is not listed itself, only its children: accelerate would load it whole.
    """
    places: dict[str, str] = {}
    for name, module in model.named_children():
        full = prefix + name
        if full in absent:
            places[full] = "disk"
        elif any(other.startswith(f"{full}.") for other in absent):
            places |= _places(module, absent, device, f"{full}.")
        else:
            places[full] = device
    return places


@contextmanager
def _explain_loading_errors(architecture: Architecture, source: Source) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise MorphoQuantError(
            f"{source.directory}: transformers cannot load it as {architecture.model_class} ({reason})"
        ) from error
