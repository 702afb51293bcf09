"""The quantizer that transformers' `from_pretrained` runs if config.json names quant_method 'morphoquant'."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from morphoquant_vllm.environment import checksums_wanted
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, INDEX_FILE, read_headers, read_index
from morphoquant_vllm.format.layers import stored_name
from morphoquant_vllm.format.schema import QUANT_METHOD, QuantizationSpec
from morphoquant_vllm.format.verify import verify_checkpoint
from morphoquant_vllm.hf.experts import MERGED, MorphoQuantExperts, check_merged
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear
from morphoquant_vllm.hf.settings import TOKEN_ROWS, configure


@register_quantization_config(QUANT_METHOD)
class MorphoQuantHfConfig(QuantizationConfigMixin):
    """The quantization_config of a checkpoint; MorphoQuantError if this version cannot read it."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.spec = QuantizationSpec.from_dict({"quant_method": QUANT_METHOD, **config})

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_dict()


@register_quantizer(QUANT_METHOD)
class MorphoQuantHfQuantizer(HfQuantizer):
    """Replaces the listed linears by MorphoQuantLinear before the weights are loaded, and checks them afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: MorphoQuantHfConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        # Checkpoints are always pre-quantized. But if this is true, transformers keeps the file's dtype of every tensor
        # that it renames, and ignores the requested one. It renames all tensors of a thinker.
        self.pre_quantized = False

    def validate_environment(self, *arguments: Any, device_map: Any = None, **others: Any) -> None:
        if "mps" in str(device_map):
            raise MorphoQuantError("device_map: the torch reference needs float64, which 'mps' lacks; use 'cpu'")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **others: Any
    ) -> None:
        spec: QuantizationSpec = self.quantization_config.spec
        if not checkpoint_files:
            raise MorphoQuantError("a MorphoQuant model is loaded from its checkpoint directory, not from a state_dict")
        # transformers only logs a missing tensor, and continues with random numbers.
        directory = Path(checkpoint_files[0]).parent
        # A hub's cache gets the tokenizer's files when they are asked for.
        found = verify_checkpoint(directory, checksums=checksums_wanted(), complete=False)
        _check_origin(directory, checkpoint_files, found, spec)
        mode = Mode(spec.any_row)
        renamed = _renaming(model, self)
        # from_pretrained builds the model on the meta device.
        for name, module in _module_names(model, spec.layers, "weight", renamed).items():
            layer = spec.layers[name]
            _check_linear(name, model.get_submodule(module), layer.in_features, layer.out_features, layer.bias)
            model.set_submodule(module, MorphoQuantLinear(name, layer, spec, mode))
        for name, module in _module_names(model, spec.experts, MERGED, renamed).items():
            check_merged(name, model.get_submodule(module), spec.experts[name])
            model.set_submodule(module, MorphoQuantExperts(name, spec, mode))
        _check_nothing_missing(model, directory, _renaming(model, self))

    def update_weight_conversions(
        self, weight_conversions: list[WeightConverter | WeightRenaming]
    ) -> list[WeightConverter | WeightRenaming]:
        """transformers' conversions of experts, for 16-bit experts alone."""
        return [_for_whole_names(entry) for entry in super().update_weight_conversions(weight_conversions)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, (MorphoQuantLinear, MorphoQuantExperts)):
                module.check()
        if self.quantization_config.spec.placeholder_token_ids:
            # As in vLLM: each token is quantized by its modality's row.
            configure(model, row=TOKEN_ROWS)
        return model

    def is_serializable(self) -> NoReturn:
        """Refuse save_pretrained, which calls this; the error names the reason."""
        raise MorphoQuantError(
            "save_pretrained: a MorphoQuant model is not saved back, since transformers renames tensors and rewrites "
            "the files that the checkpoint carries byte for byte; copy the checkpoint directory instead"
        )

    @property
    def is_trainable(self) -> bool:
        return False


def _check_origin(directory: Path, files: list[str], found: QuantizationSpec, given: QuantizationSpec) -> None:
    """Refuse weight files that were not checked, and settings of another checkpoint than the one `found`."""
    read, listed = {Path(file).name for file in files}, set(read_index(directory).values())
    if read != listed:
        # Of several files it reads only model.safetensors, if one has this name.
        raise MorphoQuantError(
            f"{directory}: transformers would read {min(read)}, but {INDEX_FILE} names {min(listed)} for "
            f"{len(listed)} weight files; leave use_safetensors and variant out, and call no shard model.safetensors"
        )
    if replace(found, created_by="") != replace(given, created_by=""):
        raise MorphoQuantError(
            f"{directory / CONFIG_FILE}: its quantization_config is not the one of the config that is given; load "
            "without config= and quantization_config=, or with this directory's own"
        )


def _module_names(
    model: PreTrainedModel, listed: Collection[str], tensor: str, renamed: Callable[[str], str]
) -> dict[str, str]:
    """Module name of each listed layer, or list of experts, whose 16-bit module has a `tensor`."""
    weights = model.state_dict()
    modules, missing = {}, []
    for name in listed:
        key = renamed(stored_name(name, tensor))
        if key in weights:
            modules[name] = key.removesuffix(f".{tensor}")
        else:
            missing.append(name)
    if missing:
        raise MorphoQuantError(
            f"{type(model).__name__} has no layer {missing[0]} ({len(missing)} of {len(listed)} quantized layers "
            "are missing); load the class that config.json names under 'architectures'"
        )
    return modules


def _renaming(model: PreTrainedModel, quantizer: MorphoQuantHfQuantizer) -> Callable[[str], str]:
    """A function from a stored name to transformers' name of the tensor in `model`."""
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    weights = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, weights)[0]


def _for_whole_names(entry: WeightConverter | WeightRenaming) -> WeightConverter | WeightRenaming:
    """A conversion that takes no `gate_proj.weight_codes` for a `gate_proj.weight`, which begins alike."""
    if not isinstance(entry, WeightConverter):
        return entry
    sources = [f"{source}$" if source.endswith(".weight") else source for source in entry.source_patterns]
    whole = WeightConverter(sources, entry.target_patterns, entry.operations, entry.force_cpu)
    whole.scope_prefix, whole.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
    return whole


def _check_nothing_missing(model: PreTrainedModel, directory: Path, renamed: Callable[[str], str]) -> None:
    """Refuse a checkpoint that lacks a tensor of the model, also one without a list of tensors (version 2)."""
    stored = {renamed(name) for name in read_headers(directory)}
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys() - stored
    if expected:
        raise MorphoQuantError(
            f"{directory}: tensor {min(expected)} of {type(model).__name__} is missing ({len(expected)} are); "
            "copy the checkpoint again, or calibrate again"
        )


def _check_linear(name: str, module: nn.Module, in_features: int, out_features: int, bias: bool) -> None:
    if not isinstance(module, nn.Linear) or (module.in_features, module.out_features) != (in_features, out_features):
        raise MorphoQuantError(
            f"{name}: the model has {module}, the checkpoint [{out_features}, {in_features}]; "
            "config.json does not belong to these weights"
        )
    if (module.bias is not None) != bias:
        raise MorphoQuantError(f"{name}: the model and the checkpoint disagree about a bias; config.json was changed")


def _pass_to_thinkers(config_class: type[PreTrainedConfig]) -> None:
    """Let a thinker's section of config.json have the file's quantization_config, which it does not contain.

    Without it `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(DIR)` would fill the quantized layers with
    random numbers. So `get_config_dict` of that one config class is replaced.
    """
    original = config_class.get_config_dict

    def get_config_dict(
        cls: type[PreTrainedConfig], name: Any, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, rest = original(name, **arguments)
        quantization = config.get("quantization_config")
        thinker = config.get("thinker_config")
        ours = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
        if ours and isinstance(thinker, dict):
            config = {**config, "thinker_config": {**thinker, "quantization_config": quantization}}
        return config, rest

    config_class.get_config_dict = classmethod(get_config_dict)


for _config_class in (Qwen2_5OmniThinkerConfig, Qwen3OmniMoeThinkerConfig):
    _pass_to_thinkers(_config_class)
