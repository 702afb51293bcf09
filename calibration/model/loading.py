"""Loads the source model: the modules before its decoder blocks, and the blocks one at a time."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from calibration.model.architectures import Architecture
from calibration.model.buffers import compute_buffers
from calibration.model.experts import CHOSEN, StoredExperts, find_experts, load_merged, merged_parameter
from calibration.model.fp8 import is_serving_only
from calibration.model.head_tensor import is_head
from calibration.model.plan import DecoderNames
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

# Files of older versions of transformers hold them in each block, and they are computed: rotary frequencies, and masks
# of GPT's attention.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")
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


class Blocks(Protocol):
    """The decoder's blocks, loaded one at a time, in any order, and again."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> nn.Module:
        """One block with its weights, on the device on which it runs; only the caller holds a reference."""


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


class BlockLoader:
    """The decoder blocks of a source model; a block's weights are read from the files when it is loaded."""

    def __init__(
        self,
        architecture: Architecture,
        source: Source,
        names: DecoderNames,
        recipe: Recipe,
        device: torch.device | None = None,
    ) -> None:
        """Create the blocks on the meta device; `device` None means the recipe's.

        Raises MorphoQuantError naming the first tensor that the files lack or that nothing reads, or of another shape.
        """
        self._source, self._names = source, names
        self._device = device or choose_device(recipe.device)
        model = empty_model(architecture, source, recipe)
        self._blocks = list(model.get_submodule(architecture.block_module).children())
        further = names.layer(len(self._blocks), "")
        for stored in source.tensors:
            if stored.startswith(further):
                raise MorphoQuantError(
                    f"{source.directory}: config.json asks for {len(self._blocks)} decoder blocks, but the weights "
                    f"hold {stored}; download the model again"
                )
        # By block: its lists of experts that transformers holds in another form than the files.
        self._experts = [self._merged_experts(architecture, index) for index in range(len(self._blocks))]
        for index, block in enumerate(self._blocks):
            compute_buffers(model, block)
            # Parameters, and the buffers that files hold.
            for name, parameter in block.state_dict().items():
                experts = self._experts[index].get(merged_parameter(name) or "")
                self._check_stored(architecture, names.layer(index, name), tuple(parameter.shape), experts)
            self._check_read(architecture, index, model._keys_to_ignore_on_load_unexpected or ())

    def _merged_experts(self, architecture: Architecture, index: int) -> dict[str, StoredExperts]:
        found = {}
        for name in self._blocks[index].state_dict():
            parent = merged_parameter(name)
            # Unknown experts are taken as they lie there, if they do.
            if parent is None or (not architecture.experts and self._names.layer(index, name) in self._source.tensors):
                continue
            experts = find_experts(self._names.layer(index, parent), self._source.tensors)
            if experts is not None:
                found[parent] = experts
        return found

    def _check_stored(
        self, architecture: Architecture, stored: str, wanted: tuple[int, ...], experts: StoredExperts | None
    ) -> None:
        """Refuse a parameter of the shape `wanted` that the files lack or hold in another shape."""
        info = self._source.tensors.get(stored)
        if experts is not None:
            shape: tuple[int, ...] | None = experts.merged_shape(stored)
        else:
            shape = None if info is None else info.shape
        if shape is None:
            raise MorphoQuantError(f"{self._source.directory}: the weights lack {stored}; download the model again")
        if shape != wanted:
            raise MorphoQuantError(
                f"{self._source.directory}: transformers cannot load it as {architecture.model_class} ({stored} is "
                f"{list(shape)} in the files, but {list(wanted)} by config.json)"
            )

    def _check_read(self, architecture: Architecture, index: int, ignored: Collection[str]) -> None:
        """Refuse a tensor of a block that nothing reads; `ignored` are patterns of those that transformers leaves out.

        Calibration would run another model than the files', and vLLM would refuse the tensor, or read it.
        """
        block = self._blocks[index]
        read = {self._names.layer(index, name) for name in (*block.state_dict(), *dict(block.named_buffers()))}
        read |= {name for experts in self._experts[index].values() for name in experts.tensors}
        for stored in self._source.tensors:
            if not stored.startswith(self._names.layer(index, "")) or stored in read or is_serving_only(stored):
                continue
            if not any(re.search(pattern, stored) for pattern in (*ignored, *_OLD_BUFFERS)):
                raise MorphoQuantError(
                    f"{self._source.directory}: {stored} is in the files, but {architecture.model_class} has no such "
                    "tensor by config.json; correct config.json (as attention_bias), or remove the tensor"
                )

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        """One block with its weights; MorphoQuantError if a file is damaged."""
        # The previous block, and the model that ran before the first, contain reference cycles (accelerate's hooks).
        # Without this call, Python would free their gigabytes only at its next collection.
        gc.collect()
        block = self._blocks[index]
        weights = {}
        for name, parameter in block.state_dict().items():
            experts = self._experts[index].get(merged_parameter(name) or "")
            if experts is not None:
                weights[name] = load_merged(self._source, experts, name, self._device, parameter.dtype)
                continue
            stored = self._source.load(self._names.layer(index, name))
            # A copy outside the mapped file, whose alignment depends on the file: products of differently aligned
            # tensors can differ in their last bits.
            weights[name] = stored.to(self._device, parameter.dtype, copy=True)
        filled = copy.deepcopy(block)
        filled.load_state_dict(weights, assign=True)
        # Computed buffers, which are on the CPU; the weights are there already.
        return filled.to(self._device).requires_grad_(False)


@contextmanager
def _explain_loading_errors(architecture: Architecture, source: Source) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise MorphoQuantError(
            f"{source.directory}: transformers cannot load it as {architecture.model_class} ({reason})"
        ) from error
