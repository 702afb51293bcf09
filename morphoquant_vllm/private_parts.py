"""The interfaces of torch, transformers and Triton that are used although none of them promises to keep these.

`tests/morphoquant_vllm/test_private_parts.py` compares the list with the source and with what is installed.
"""

from __future__ import annotations

_PATTERNS = "torch._inductor.pattern_matcher"
_LOADING = "transformers.core_model_loading"
_QUANTIZER = "transformers.quantizers.base:HfQuantizer"
_MODEL = "transformers.modeling_utils:PreTrainedModel"

_COMPILED = "triton.compiler.compiler:CompiledKernel"
# In Triton 3.6 the parameters after `function` are part of args.
_LAUNCHER = (
    "(self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook, "
    "launch_exit_hook, *args)"
)

# In the form of compat.INTERFACES, for morphoquant_vllm and calibration. The list holds names with an underscore, names
# inside transformers' modules, the members that are read or overridden there, and Triton's launch interface.
PRIVATE_PARTS: dict[str, str] = {
    # plugin/silu_mul_pass.py: the graph pass of torch's compiler
    f"{_PATTERNS}:PatternMatcherPass": "class(object)",
    f"{_PATTERNS}:PatternMatcherPass.__init__": "(self, pass_name=None, subsystem=None)",
    f"{_PATTERNS}:PatternMatcherPass.apply": "(self, gm)",
    f"{_PATTERNS}:fwd_only": (
        "(fn, args, *, run_functional_passes=True, get_decomp_fn=<function select_decomp_table>)"
    ),
    f"{_PATTERNS}:register_replacement": (
        "(search_fn, replace_fn, example_inputs, trace_fn, pass_dicts, extra_check=<function _return_true>, "
        "scalar_workaround=None, exclusive_arg_names=(), search_fn_pattern=None, skip_duplicates=False, "
        "pattern_name=None, get_decomp_fn=<function select_decomp_table>)"
    ),
    "torch._subclasses.fake_tensor:FakeTensorMode": "class(TorchDispatchMode)",
    # calibration/model/loading.py: code in the model's directory, on request
    "transformers.dynamic_module_utils:get_class_from_dynamic_module": (
        "(class_reference, pretrained_model_name_or_path, cache_dir=None, force_download=False, "
        "proxies=None, token=None, revision=None, local_files_only=False, repo_type=None, "
        "code_revision=None, **kwargs)"
    ),
    # calibration/model/buffers.py: buffers that no file holds
    "transformers:PreTrainedModel._init_weights": "(self, module)",
    # hf/linear.py: buffers that keep their dtype
    "torch.nn:Module._apply": "(self, fn, recurse=True)",
    # calibration/quantize/int8_products.py
    "torch:_int_mm": "function",
    # hf/quantizer.py: how transformers loads a quantized model
    "transformers.conversion_mapping:get_model_conversion_mapping": (
        "(model, key_mapping=None, hf_quantizer=None, add_legacy=True)"
    ),
    f"{_LOADING}:WeightConverter": "class(WeightTransform)",
    f"{_LOADING}:WeightRenaming": "class(WeightTransform)",
    f"{_LOADING}:rename_source_key": (
        "(source_key, weight_renamings, weight_converters, base_model_prefix=None, meta_state_dict=None, reverse=False)"
    ),
    "transformers.models.qwen2_5_omni.configuration_qwen2_5_omni:Qwen2_5OmniThinkerConfig": "class(PreTrainedConfig)",
    "transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe:Qwen3OmniMoeThinkerConfig": (
        "class(PreTrainedConfig)"
    ),
    f"{_LOADING}:WeightConverter.__init__": "(self, source_patterns, target_patterns, operations, force_cpu=False)",
    f"{_LOADING}:WeightTransform.scope_prefix": "attribute",
    f"{_LOADING}:WeightTransform.base_model_prefix": "attribute",
    f"{_QUANTIZER}.update_weight_conversions": "(self, weight_conversions)",
    "transformers.configuration_utils:PreTrainedConfig.get_config_dict": "(pretrained_model_name_or_path, **kwargs)",
    "transformers.quantizers.auto:register_quantization_config": "(method)",
    "transformers.quantizers.auto:register_quantizer": "(name)",
    _QUANTIZER: "class(ABC)",
    f"{_QUANTIZER}.__init__": "(self, quantization_config, **kwargs)",
    f"{_QUANTIZER}.quantization_config": "attribute",
    f"{_QUANTIZER}.requires_calibration": "attribute",
    f"{_QUANTIZER}.pre_quantized": "attribute",
    f"{_QUANTIZER}.validate_environment": "(self, *args, **kwargs)",
    f"{_QUANTIZER}._process_model_before_weight_loading": "(self, model, **kwargs)",
    f"{_QUANTIZER}._process_model_after_weight_loading": "(self, model, **kwargs)",
    f"{_QUANTIZER}.is_serializable": "(self)",
    f"{_QUANTIZER}.is_trainable": "property",
    "transformers.utils.quantization_config:QuantizationConfigMixin": "class(object)",
    "transformers.utils.quantization_config:QuantizationConfigMixin.to_dict": "(self)",
    # calibration/model/loading.py: a model without weights
    f"{_MODEL}._from_config": "(config, **kwargs)",
    f"{_MODEL}.all_tied_weights_keys": "attribute",
    f"{_MODEL}._keys_to_ignore_on_load_unexpected": "attribute",
    "transformers.configuration_utils:PreTrainedConfig._attn_implementation": "property",
    # gpu/launcher.py and gpu/int8_path.py: how Triton launches a compiled kernel, and the fields of a descriptor
    f"{_COMPILED}.run": "property",
    f"{_COMPILED}.function": "attribute",
    f"{_COMPILED}.packed_metadata": "attribute",
    f"{_COMPILED}.launch_metadata": "(self, grid, stream, *args)",
    "triton.backends.nvidia.driver:CudaLauncher.__call__": _LAUNCHER,
    "triton.backends.amd.driver:HIPLauncher.__call__": _LAUNCHER,
    "triton.knobs:HookChain.calls": "attribute",
    "triton.runtime.driver:DriverConfig._active": "attribute",
    "triton.tools.tensor_descriptor:TensorDescriptor": "class(object)",
    # calibration/data/media.py and cli.py
    "transformers.video_utils:VideoMetadata": "class(Mapping)",
    "transformers.utils:logging": "object",
}
