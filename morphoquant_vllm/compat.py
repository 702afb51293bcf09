"""The interfaces of vLLM 0.32 that the plugin uses. `python -m morphoquant_vllm.compat` compares the installed vLLM.

The package has no branch on vLLM's version. A branch that becomes necessary belongs here, with a test that fails when
the oldest vLLM of pyproject.toml no longer needs it. `tests/morphoquant_vllm/test_compat.py` refuses it anywhere else.
Imports the standard library only, and vLLM while it compares.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

# Versions of vLLM whose engine has run tests, all of them on the last; the interfaces below are that one's.
TESTED = ("0.30.0", "0.31.0", "0.32.0")
# How an interface is described that vLLM does not have.
MISSING = "missing"

_CONFIG = "vllm.config"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_BASE = _QUANTIZATION + ".base_config"
_LINEAR = "vllm.model_executor.layers.linear"
_MOE = "vllm.model_executor.layers.fused_moe"
_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
_PARAMETER = "vllm.model_executor.parameter"
_LOADER = "vllm.model_executor.model_loader.default_loader"
_CREATE_WEIGHTS = (
    "(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, "
    "**extra_weight_attrs)"
)

# "module:name" or "module:Class.member" -> a function's parameters, a class's bases, or the kind of a member.
# The list holds the names that the plugin imports, the members that it reads or calls, and the methods it overrides.
INTERFACES: dict[str, str] = {
    "vllm.plugins:DEFAULT_PLUGINS_GROUP": "'vllm.general_plugins'",
    "vllm.logger:init_logger": "(name)",
    "vllm.logger:_VllmLogger.info_once": "(self, msg, *args, scope='local')",
    "vllm.logger:_VllmLogger.warning_once": "(self, msg, *args, scope='local')",
    f"{_CONFIG}:get_current_vllm_config": "()",
    f"{_CONFIG}:get_current_vllm_config_or_none": "()",
    f"{_CONFIG}:VllmConfig": "class(object)",
    f"{_CONFIG}:VllmConfig.additional_config": "attribute",
    f"{_CONFIG}:VllmConfig.quant_config": "attribute",
    f"{_CONFIG}:VllmConfig.model_config": "attribute",
    f"{_CONFIG}:VllmConfig.parallel_config": "attribute",
    f"{_CONFIG}:VllmConfig.scheduler_config": "attribute",
    f"{_CONFIG}:VllmConfig.cache_config": "attribute",
    f"{_CONFIG}:VllmConfig.lora_config": "attribute",
    f"{_CONFIG}:VllmConfig.speculative_config": "attribute",
    f"{_CONFIG}:ModelConfig.hf_config": "attribute",
    f"{_CONFIG}:ModelConfig.is_multimodal_model": "property",
    f"{_CONFIG}:ModelConfig.get_multimodal_config": "(self)",
    f"{_CONFIG}:MultiModalConfig.enable_mm_embeds": "attribute",
    f"{_CONFIG}:ModelConfig.is_encoder_decoder": "property",
    f"{_CONFIG}:ModelConfig.enable_prompt_embeds": "attribute",
    f"{_CONFIG}:ParallelConfig.pipeline_parallel_size": "attribute",
    f"{_CONFIG}:ParallelConfig.prefill_context_parallel_size": "attribute",
    f"{_CONFIG}:ParallelConfig.decode_context_parallel_size": "attribute",
    f"{_CONFIG}:ParallelConfig.use_ubatching": "property",
    f"{_CONFIG}:ParallelConfig.use_sequence_parallel_moe": "property",
    f"{_CONFIG}:CacheConfig.kv_sharing_fast_prefill": "attribute",
    f"{_CONFIG}:SchedulerConfig.max_num_batched_tokens": "attribute",
    f"{_CONFIG}:VllmConfig.compilation_config": "attribute",
    f"{_CONFIG}:CompilationConfig.inductor_compile_config": "attribute",
    "vllm.multimodal:MULTIMODAL_REGISTRY": "object",
    "vllm.multimodal.registry:MultiModalRegistry.get_processing_info": "(self, model_config)",
    "vllm.multimodal.processing:BaseProcessingInfo.allowed_mm_limits": "property",
    "vllm.platforms:current_platform": "object",
    "vllm.platforms.interface:Platform.pass_key": "property",
    "vllm.compilation.passes.inductor_pass:InductorPass": "class(CustomGraphPass)",
    "vllm.compilation.passes.inductor_pass:InductorPass.uuid": "(self)",
    "vllm.compilation.passes.inductor_pass:InductorPass.hash_source": "(*srcs)",
    f"{_QUANTIZATION}:register_quantization_config": "(quantization)",
    f"{_BASE}:QuantizeMethodBase": "class(ABC)",
    f"{_BASE}:QuantizeMethodBase.process_weights_after_loading": "(self, layer)",
    f"{_BASE}:QuantizationConfig": "class(ABC)",
    f"{_BASE}:QuantizationConfig.__init__": "(self)",
    f"{_BASE}:QuantizationConfig.packed_modules_mapping": "attribute",
    f"{_BASE}:QuantizationConfig.get_name": "(self)",
    f"{_BASE}:QuantizationConfig.get_supported_act_dtypes": "(self)",
    f"{_BASE}:QuantizationConfig.get_min_capability": "()",
    f"{_BASE}:QuantizationConfig.get_config_filenames": "()",
    f"{_BASE}:QuantizationConfig.from_config": "(config)",
    f"{_BASE}:QuantizationConfig.maybe_update_config": "(self, model_name, hf_config=None, revision=None)",
    f"{_BASE}:QuantizationConfig.apply_vllm_mapper": "(self, hf_to_vllm_mapper)",
    f"{_BASE}:QuantizationConfig.get_quant_method": "(self, layer, prefix)",
    "vllm.model_executor.models.utils:WeightsMapper": "class(object)",
    "vllm.model_executor.models.utils:WeightsMapper.apply_dict": "(self, values)",
    "vllm.model_executor.models.utils:WeightsMapper.orig_to_new_stacked": "attribute",
    "vllm.model_executor.model_loader.utils:get_model_cls": "(model_config)",
    f"{_CONFIG}:set_current_vllm_config": "(vllm_config, check_compile=False, prefix=None)",
    f"{_CONFIG}:ModelConfig.dtype": "attribute",
    f"{_CONFIG}:ModelConfig.model": "attribute",
    f"{_CONFIG}:ModelConfig.revision": "attribute",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": "class(object)",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model": "(self, scheduler_output)",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.vllm_config": "attribute",
    "vllm.v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens": "attribute",
    "vllm.distributed:get_pp_group": "()",
    "vllm.distributed:get_tensor_model_parallel_rank": "()",
    "vllm.distributed:get_tensor_model_parallel_world_size": "()",
    "vllm.model_executor.layers.attention:Attention": "class(Module, AttentionLayerBase)",
    "vllm.model_executor.layers.attention:Attention.kv_cache_dtype": "attribute",
    f"{_QUANTIZATION}.kv_cache:BaseKVCacheMethod": "class(QuantizeMethodBase)",
    f"{_QUANTIZATION}.kv_cache:BaseKVCacheMethod.__init__": "(self, quant_config)",
    f"{_QUANTIZATION}.kv_cache:BaseKVCacheMethod.create_weights": "(self, layer)",
    f"{_QUANTIZATION}.kv_cache:BaseKVCacheMethod.process_weights_after_loading": "(self, layer)",
    f"{_CONFIG}:ModelConfig": "class(object)",
    f"{_CONFIG}:ModelConfig.quantization": "attribute",
    "vllm.v1.worker.gpu_worker:Worker": "class(WorkerBase)",
    "vllm.v1.worker.gpu_worker:Worker.sleep": "(self, level=1)",
    "vllm:envs": "object",
    "vllm.model_executor.model_loader:get_model_loader": "(load_config)",
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader": "class(ABC)",
    "vllm.model_executor.model_loader.reload:layerwise": "object",
    "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing": "(model, model_config)",
    "vllm.model_executor.model_loader.runai_streamer_loader:RunaiModelStreamerLoader": "class(BaseModelLoader)",
    "vllm.model_executor.model_loader.runai_streamer_loader:RunaiModelStreamerLoader.load_weights": (
        "(self, model, model_config)"
    ),
    f"{_LINEAR}:MergedColumnParallelLinear.output_sizes": "attribute",
    f"{_LINEAR}:MergedColumnParallelLinear.gather_output": "attribute",
    f"{_LINEAR}:RowParallelLinear.input_is_parallel": "attribute",
    f"{_LOADER}:DefaultModelLoader": "class(BaseModelLoader)",
    f"{_LOADER}:DefaultModelLoader.load_weights": "(self, model, model_config)",
    f"{_LOADER}:DefaultModelLoader.track_weights_loading": "(self, model, loaded_weights, quantized=False)",
    "vllm.model_executor.model_loader:ShardedStateLoader": "class(BaseModelLoader)",
    "vllm.model_executor.model_loader:ShardedStateLoader.save_model": "(model, path, pattern=None, max_size=None)",
    "vllm.distributed:init_distributed_environment": (
        "(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, backend='nccl', timeout=None)"
    ),
    "vllm.distributed:ensure_model_parallel_initialized": (
        "(tensor_model_parallel_size, pipeline_model_parallel_size, prefill_context_model_parallel_size=1, "
        "decode_context_model_parallel_size=1, backend=None)"
    ),
    "vllm.engine.arg_utils:EngineArgs": "class(object)",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "(self, usage_context=None, headless=False)",
    "vllm.model_executor.model_loader.utils:initialize_model": (
        "(vllm_config, *, prefix='', model_class=None, model_config=None)"
    ),
    "vllm.utils.torch_utils:set_default_torch_dtype": "(dtype)",
    "vllm.model_executor.model_loader.weight_utils:download_weights_from_hf": (
        "(model_name_or_path, cache_dir, allow_patterns, revision=None, subfolder=None, ignore_patterns=None)"
    ),
    "vllm.model_executor.model_loader.weight_utils:maybe_download_from_modelscope": (
        "(model, revision=None, download_dir=None, ignore_patterns=None, allow_patterns=None)"
    ),
    f"{_CONFIG}:VllmConfig.load_config": "attribute",
    f"{_CONFIG}:LoadConfig.download_dir": "attribute",
    f"{_MOE}:RoutedExperts": "class(PluggableLayer)",
    f"{_MOE}:RoutedExperts.moe_config": "attribute",
    f"{_MOE}:RoutedExperts.expert_map": "property",
    f"{_MOE}:RoutedExperts.expert_map_manager": "attribute",
    f"{_MOE}:RoutedExperts.apply_router_weight_on_input": "attribute",
    f"{_MOE}:RoutedExperts.swiglu_limit": "attribute",
    f"{_MOE}:RoutedExperts.swiglu_alpha": "attribute",
    f"{_MOE}:RoutedExperts.swiglu_beta": "attribute",
    f"{_MOE}:GateLinear": "class(ReplicatedLinear)",
    f"{_MOE}:FusedMoEMethodBase": "class(QuantizeMethodBase)",
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.__init__": "(self, moe)",
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.create_weights": (
        "(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs)"
    ),
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.get_fused_moe_quant_config": "(self, layer)",
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.apply": (
        "(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)"
    ),
    f"{_MOE}.activation:MoEActivation.SILU": "attribute",
    f"{_MOE}.config:FUSED_MOE_UNQUANTIZED_CONFIG": "object",
    f"{_MOE}.config:FusedMoEQuantConfig": "class(object)",
    f"{_MOE}.activation:MoEActivation": "class(Enum)",
    "vllm.platforms.interface:Platform.is_cpu": "(self)",
    f"{_MOE}.config:FusedMoEConfig.num_experts": "attribute",
    f"{_MOE}.config:FusedMoEConfig.hidden_dim": "attribute",
    f"{_MOE}.config:FusedMoEConfig.intermediate_size": "attribute",
    f"{_MOE}.config:FusedMoEConfig.activation": "attribute",
    f"{_MOE}.config:FusedMoEConfig.has_bias": "attribute",
    f"{_MOE}.config:FusedMoEConfig.is_lora_enabled": "attribute",
    f"{_MOE}.config:FusedMoEConfig.moe_parallel_config": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.tp_rank": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.tp_size": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.dp_size": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.pcp_size": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.use_ep": "attribute",
    f"{_MOE}.config:FusedMoEParallelConfig.enable_eplb": "attribute",
    f"{_MOE}.expert_map_manager:ExpertMapManager.map_global_to_local": "(self, global_id)",
    f"{_MOE}.expert_map_manager:ExpertMapManager.num_fused_shared_experts": "attribute",
    f"{_CONFIG}:LoadConfig.load_format": "attribute",
    f"{_LINEAR}:LinearBase": "class(PluggableLayer)",
    f"{_LINEAR}:LinearBase.tp_rank": "attribute",
    f"{_LINEAR}:LinearBase.tp_size": "attribute",
    f"{_LINEAR}:LinearMethodBase": "class(QuantizeMethodBase)",
    f"{_LINEAR}:LinearMethodBase.create_weights": _CREATE_WEIGHTS,
    f"{_LINEAR}:LinearMethodBase.apply": "(self, layer, x, bias=None)",
    f"{_LINEAR}:UnquantizedLinearMethod": "class(LinearMethodBase)",
    f"{_LINEAR}:MergedColumnParallelLinear": "class(ColumnParallelLinear)",
    f"{_LINEAR}:QKVParallelLinear": "class(ColumnParallelLinear)",
    f"{_LINEAR}:QKVParallelLinear.num_kv_head_replicas": "attribute",
    f"{_LINEAR}:QKVParallelLinear.output_sizes": "attribute",
    f"{_LINEAR}:RowParallelLinear": "class(LinearBase)",
    f"{_LINEAR}:register_weight_loader_v2_supported_method": "(cls)",
    f"{_EMBEDDING}:VocabParallelEmbedding": "class(PluggableLayer)",
    f"{_EMBEDDING}:VocabParallelEmbedding.__init__": (
        "(self, num_embeddings, embedding_dim, params_dtype=None, org_num_embeddings=None, padding_size=64, "
        "quant_config=None, prefix='', *, disable_tp=False, reduce_results=True, quant_method=None, "
        "parallel_group=None)"
    ),
    f"{_EMBEDDING}:VocabParallelEmbedding.quant_method": "attribute",
    "vllm.model_executor.custom_op:PluggableLayer": "class(Module)",
    "vllm.model_executor.custom_op:PluggableLayer.register_oot": "(_decorated_layer_cls=None, name=None)",
    "vllm.model_executor.custom_op:op_registry_oot": "object",
    f"{_EMBEDDING}:VocabParallelEmbedding.num_embeddings": "attribute",
    f"{_EMBEDDING}:VocabParallelEmbedding.forward": "(self, input_)",
    f"{_EMBEDDING}:ParallelLMHead": "class(VocabParallelEmbedding)",
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod": "class(QuantizeMethodBase)",
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.create_weights": _CREATE_WEIGHTS,
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.process_weights_after_loading": "(self, layer)",
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.tie_weights": "(self, layer, embed_tokens)",
    f"{_CONFIG}:ModelConfig.head_dtype": "property",
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.apply": "(self, layer, x, bias=None)",
    f"{_PARAMETER}:BasevLLMParameter": "class(Parameter)",
    f"{_PARAMETER}:BasevLLMParameter.__new__": "(cls, data, **kwargs)",
    f"{_PARAMETER}:BasevLLMParameter.__init__": "(self, data, weight_loader)",
    f"{_PARAMETER}:BasevLLMParameter.tp_rank": "attribute",
    f"{_PARAMETER}:BasevLLMParameter.load_column_parallel_weight": "(self, loaded_weight)",
    f"{_PARAMETER}:BasevLLMParameter.load_merged_column_weight": "(self, loaded_weight, **kwargs)",
    f"{_PARAMETER}:BasevLLMParameter.load_qkv_weight": "(self, loaded_weight, **kwargs)",
    f"{_PARAMETER}:BasevLLMParameter.load_row_parallel_weight": "(self, loaded_weight)",
    f"{_PARAMETER}:ChannelQuantScaleParameter": "class(_ColumnvLLMParameter)",
    f"{_PARAMETER}:ChannelQuantScaleParameter.__init__": "(self, output_dim, **kwargs)",
    f"{_PARAMETER}:ChannelQuantScaleParameter.load_row_parallel_weight": "(self, loaded_weight)",
    f"{_PARAMETER}:GroupQuantScaleParameter": "class(_ColumnvLLMParameter, RowvLLMParameter)",
    f"{_PARAMETER}:GroupQuantScaleParameter.__init__": "(self, output_dim, **kwargs)",
    f"{_PARAMETER}:PackedvLLMParameter": "class(ModelWeightParameter)",
    f"{_PARAMETER}:PackedvLLMParameter.__init__": "(self, packed_factor, packed_dim, marlin_tile_size=None, **kwargs)",
}


def differences(expected: Mapping[str, str]) -> list[str]:
    """The differences between the installed packages and a list in the form of INTERFACES, one line each."""
    described = {path: describe(path) for path in expected}
    return [f"{path} is {described[path]}, not {words}" for path, words in expected.items() if described[path] != words]


def describe(path: str) -> str:
    """Describe `path`, "module:name" or "module:Class.member", in the form of INTERFACES; "missing" if it is absent."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        return f"{MISSING} ({' '.join(str(problem).split())})"
    owner_name, _, member = name.partition(".")
    owner = getattr(module, owner_name, None)
    if owner is None:
        return MISSING
    return _member(owner, member) if member else _thing(owner)


def _thing(thing: Any) -> str:
    if isinstance(thing, str):
        return repr(thing)
    if inspect.isclass(thing):
        return f"class({', '.join(base.__name__ for base in thing.__bases__)})"
    if not inspect.isroutine(thing):
        return "object"
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return "function"  # a C++ function has no signature
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    words = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    # A default that is a function is shown with its address.
    return re.sub(r" at 0x[0-9a-f]+>", ">", words)


def _member(owner: type, name: str) -> str:
    unset = object()
    member = inspect.getattr_static(owner, name, unset)
    if isinstance(member, (property, cached_property)):
        return "property"
    if inspect.isroutine(member):
        return _thing(getattr(owner, name))
    declared = member is not unset or any(name in inspect.get_annotations(cls) for cls in owner.__mro__)
    library = owner.__module__.partition(".")[0]
    classes = [cls for cls in owner.__mro__ if cls.__module__.partition(".")[0] == library]
    set_on_instances = any(name in _set_on_self(cls) for cls in classes)
    return "attribute" if declared or set_on_instances else MISSING


@cache
def _set_on_self(cls: type) -> set[str]:
    """Attributes that the methods of `cls` assign to `self`; only the source shows them."""
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def installed_version() -> str:
    """The version of the installed vLLM."""
    return importlib.metadata.version("vllm")


def main() -> int:
    """Print the differences; exit status 1 if there are any."""
    lines = differences(INTERFACES)
    version = installed_version()
    for line in lines:
        print(line)
    print(f"vLLM {version}: {len(INTERFACES) - len(lines)} of {len(INTERFACES)} interfaces are as the plugin uses them")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
