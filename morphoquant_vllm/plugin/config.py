"""The quantization config of vLLM: it decides the method of each layer of a model.

The config object is pickled to the engine and its workers; it holds plain data only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import ExpertsSpec, LayerSpec
from morphoquant_vllm.format.schema import QUANT_METHOD, QuantizationSpec
from morphoquant_vllm.plugin.last_word import LastWord, open_last_word
from morphoquant_vllm.plugin.layer_names import DRAFT_PREFIX, local_name, packed_names, stacked_names
from morphoquant_vllm.plugin.log import plugin_logger

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.models.utils import WeightsMapper

    from morphoquant_vllm.format.kv_cache import AttentionRange
    from morphoquant_vllm.plugin.escape_metrics import MetricsFolder
    from morphoquant_vllm.plugin.escape_watch import EscapeWatch
    from morphoquant_vllm.plugin.mlp_channel_order import MlpOrder
    from morphoquant_vllm.plugin.modality_bus import ModalityBus
    from morphoquant_vllm.plugin.reload import ReloadCheck
    from morphoquant_vllm.plugin.sharded_state import RankState

logger = plugin_logger(__name__)

# Functions of a layer's method that vLLM calls while it loads a model, and that may refuse the checkpoint.
_LOADING_METHODS = ("create_weights", "process_weights_after_loading")


class MorphoQuantConfig(QuantizationConfig):
    """quantization_config of a MorphoQuant checkpoint, as vLLM wants it."""

    def __init__(self, spec: QuantizationSpec | None = None, **settings: Any) -> None:
        """`settings` are those of a quantization_config instead of a `spec`: vLLM-Omni's factory passes them."""
        super().__init__()
        if settings:
            spec = QuantizationSpec.from_dict({"quant_method": QUANT_METHOD, **settings})
        # None if the user named this method for a model without a quantization_config.
        self.spec = spec
        # Layer settings by vLLM's (unfused) names; the format's names until the model class maps them.
        self.layers: dict[str, LayerSpec] = dict(spec.layers) if spec else {}
        self.experts: dict[str, ExpertsSpec] = dict(spec.experts) if spec else {}
        self.attention: dict[str, AttentionRange] = dict(spec.kv_cache) if spec else {}
        # Names of the linears in the files.
        self._stored = {name: name for name in (*self.layers, *self.experts)}
        # Created with the layers of a model, in the process that has them.
        self._bus: ModalityBus | None = None
        self.escape_watch: EscapeWatch | None = None
        self._mlps: dict[str, MlpOrder] = {}
        self._reload_check: ReloadCheck | None = None
        # A model's hub id until a worker has checked its files.
        self._hub_id: str | None = None
        # Whether the snapshot of that id was checked when the settings were read.
        self._snapshot_checked = False
        # Whether a worker has looked at how vLLM will load weights.
        self._loading_checked = False
        # None until the process that configures the engine has checked the files.
        self._last_word: LastWord | None = None
        self._metrics: MetricsFolder | None = None
        _patch_vllm()
        # Imported here: it imports layers, which processes that only register the method do not need.
        from morphoquant_vllm.plugin.sharded_state import SavedState

        self._saved = SavedState()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # In a worker, which gets the config by a pickle before it builds the model.
        _patch_vllm()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bus": None, "escape_watch": None, "_mlps": {}}

    def __repr__(self) -> str:
        return f"MorphoQuantConfig({len(self.layers)} layers, experts of {len(self.experts)})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MorphoQuantConfig:
        return cls(QuantizationSpec.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check the checkpoint's files before any worker starts: one clear line beats garbage weights."""
        if self.spec is None:
            raise MorphoQuantError(
                f"{model_name}: is not a MorphoQuant checkpoint (config.json has no quantization_config); serve it "
                "without --quantization morphoquant, or make a checkpoint of it with `morphoquant calibrate`"
            )
        from morphoquant_vllm.plugin.checkpoint_check import cached_snapshot, check_directory, refuse_other_settings
        from morphoquant_vllm.plugin.escape_metrics import open_metrics

        directory = Path(model_name)
        if directory.is_dir():
            if not self._saved.take(directory):
                refuse_other_settings(directory, check_directory(directory), self.spec)
        else:
            self._hub_id, snapshot = model_name, cached_snapshot(model_name, revision, self.spec)
            self._snapshot_checked = snapshot is not None
            if snapshot is not None:
                refuse_other_settings(snapshot, check_directory(snapshot, complete=False), self.spec)
            else:
                logger.info("MorphoQuant: %s is not on this disk yet; its files are checked by the workers", model_name)
        if self._last_word is None:
            self._last_word, self._metrics = open_last_word(), open_metrics()

    def _check_downloaded(self) -> None:
        """In a worker, before it loads: check a hub model that was not on the disk when the engine was configured.

        A model that was there is checked again if vLLM reads another copy: --download-dir is not known earlier.
        """
        from vllm.config import get_current_vllm_config_or_none

        from morphoquant_vllm.plugin.checkpoint_check import check_directory, download, refuse_other_settings

        config = get_current_vllm_config_or_none()
        if self._hub_id is None or config is None:
            return
        assert self.spec is not None, "maybe_update_config refuses a model without a spec"
        model, self._hub_id = self._hub_id, None
        if not self._snapshot_checked or config.load_config.download_dir is not None:
            folder = download(model, config)
            refuse_other_settings(folder, check_directory(folder, complete=False), self.spec)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.experts = hf_to_vllm_mapper.apply_dict(self.experts)
        self.attention = hf_to_vllm_mapper.apply_dict(self.attention)
        self._stored = hf_to_vllm_mapper.apply_dict(self._stored)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self._last_word is None:
            return self._method_of(layer, prefix)
        from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
        from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

        with self._last_word.keep_refusal():
            method = self._method_of(layer, prefix)
        for name in _LOADING_METHODS if method is not None else ():
            setattr(method, name, self._last_word.keep_refusal()(getattr(method, name)))
        if isinstance(method, MorphoQuantLinearMethod | MorphoQuantExpertsMethod):
            method.keep_refusal = self._last_word.keep_refusal
        return method

    def _method_of(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_downloaded()
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from morphoquant_vllm.plugin.additional_config import read_settings
        from morphoquant_vllm.plugin.engine_options import refuse_unchecked_loading
        from morphoquant_vllm.plugin.gpu_memory import refuse_offload
        from morphoquant_vllm.plugin.kv_cache import cache_method
        from morphoquant_vllm.plugin.lm_head import EightBitHeadMethod, SixteenBitHeadMethod
        from morphoquant_vllm.plugin.modality_bus import ModalityEmbeddingMethod
        from morphoquant_vllm.plugin.reload import ReloadCheck

        config = get_current_vllm_config_or_none()
        refuse_offload(config)
        if not self._loading_checked:
            refuse_unchecked_loading(config)
            self._loading_checked = True
        saved = self._saved.of_rank(config)
        check = self._reload_check = self._reload_check or ReloadCheck()
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return ModalityEmbeddingMethod(self.modality_bus())
        if isinstance(layer, ParallelLMHead):
            wanted = config is not None and read_settings(config.additional_config).lm_head == "int8"
            return EightBitHeadMethod(config, check) if wanted else SixteenBitHeadMethod(check)
        if not isinstance(layer, LinearBase):
            return cache_method(self, layer, local_name(prefix, self._stored), self.attention)
        return self._linear_method(layer, prefix, check, saved)

    def _linear_method(
        self, layer: LinearBase, prefix: str, check: ReloadCheck, saved: RankState | None
    ) -> QuantizeMethodBase:
        """The method of a linear; vLLM's own in 16 bit if the checkpoint names none of its shards."""
        from vllm.model_executor.layers.fused_moe import GateLinear
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

        shards = self.shard_names(prefix)
        quantized = [name for name in shards if name in self.layers]
        if not quantized:
            return UnquantizedLinearMethod()
        if isinstance(layer, GateLinear):
            raise MorphoQuantError(f"{prefix}: the router of experts is served in 16 bit only; calibrate again")
        if len(quantized) < len(shards):
            missing = [name for name in shards if name not in self.layers]
            raise MorphoQuantError(
                f"{prefix}: shards of a fused layer must all be quantized or none; not quantized: {missing}"
            )
        self._protect(layer, prefix)
        bus = self.modality_bus()
        settings = {name: self.layers[name] for name in shards}
        first = settings[shards[0]]
        # Towers get patches, and not the tokens of a step.
        watch = None if first.fixed_row else self._watch_of(prefix, shards[0], first.in_features, bus)
        return MorphoQuantLinearMethod(settings, bus, self._mlp_of(layer, prefix), check, watch, saved)

    def _protect(self, layer: torch.nn.Module, prefix: str) -> None:
        """Refuse, now or when it is asked for, what vLLM would do wrong to a quantized layer."""
        from morphoquant_vllm.plugin.engine_options import refuse_online
        from morphoquant_vllm.plugin.gpu_memory import patch_sleep
        from morphoquant_vllm.plugin.weight_checker import patch_weight_checker

        refuse_online(self, layer, prefix)
        patch_sleep()
        patch_weight_checker()

    def _watch_of(self, prefix: str, name: str, in_features: int, bus: ModalityBus) -> EscapeWatch | None:
        """The watch of this model, to which the input `name` is added; None if its escapes are not counted."""
        from vllm.config import get_current_vllm_config_or_none

        from morphoquant_vllm.plugin import escape_report, escape_watch
        from morphoquant_vllm.plugin.additional_config import read_settings

        config = get_current_vllm_config_or_none()
        settings = None if config is None else read_settings(config.additional_config).watch
        # A draft model gets other tokens than those of a step.
        if config is None or settings is None or prefix.startswith(DRAFT_PREFIX):
            return None
        if self.escape_watch is None:
            escape_watch.refuse_partial_steps(config)
            escape_watch.patch_steps()
            model = config.model_config
            report = None if model is None else escape_report.read_report(model.model, model.revision)
            self.escape_watch = escape_watch.EscapeWatch(settings, bus.spec.rows, self._metrics, report)
        self.escape_watch.add(name, self._stored[name], in_features)
        return self.escape_watch

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """The method of a list of experts; None, vLLM's own in 16 bit, if the checkpoint does not name it."""
        from vllm.platforms import current_platform

        from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod, refuse_sixteen_bit

        name = local_name(prefix, self._stored)
        if name not in self.experts:
            refuse_sixteen_bit(prefix, layer, current_platform.is_cpu())
            return None
        self._protect(layer, prefix)
        bus, experts = self.modality_bus(), self.experts[name]
        watch = self._watch_of(prefix, name, experts.in_features, bus)
        return MorphoQuantExpertsMethod(layer, name, experts, bus, watch)

    def _mlp_of(self, layer: torch.nn.Module, prefix: str) -> MlpOrder | None:
        """The state that gate_up_proj and down_proj of one MLP share; None if its channels may not be renumbered."""
        from vllm.config import get_current_vllm_config_or_none

        from morphoquant_vllm.plugin.mlp_channel_order import DOWN, GATE_UP, MODEL_TYPES, MlpOrder

        if prefix.endswith(GATE_UP):
            config = get_current_vllm_config_or_none()
            if config is None or config.model_config is None or config.lora_config is not None:
                return None
            if getattr(config.model_config.hf_config, "model_type", None) not in MODEL_TYPES:
                return None
            mlp = self._mlps[prefix.removesuffix(GATE_UP)] = MlpOrder()
            return mlp
        # Removed from the dictionary: a layer of another model in this process must not get it.
        shared = self._mlps.pop(prefix.removesuffix(DOWN), None) if prefix.endswith(DOWN) else None
        if shared is not None:
            shared.down = layer
        return shared

    def modality_bus(self) -> ModalityBus:
        """The bus that gives this model's linears the rows of their tokens: one per process."""
        from morphoquant_vllm.plugin.modality_bus import ModalityBus

        assert self.spec is not None, "maybe_update_config refuses a model without a spec"
        if self._bus is None:
            self._bus = ModalityBus(self.spec)
        return self._bus

    def shard_names(self, prefix: str) -> list[str]:
        """The unfused names behind a vLLM layer: ...qkv_proj -> q_proj, k_proj, v_proj; else the name itself.

        A name that the checkpoint lists was fused in the files already, as in Phi-3.
        """
        prefix = local_name(prefix, self._stored)
        if prefix in self.layers:
            return [prefix]
        return packed_names(prefix, self.packed_modules_mapping) or stacked_names(prefix, self.layers)


def _patch_vllm() -> None:
    """Replace vLLM's embedding, and patch its loading of weights and its saving of states."""
    # Imported here: they import layers, which processes that only register the method do not need.
    from morphoquant_vllm.plugin.embeddings import replace_embedding
    from morphoquant_vllm.plugin.sharded_state import patch_saving
    from morphoquant_vllm.plugin.unloaded_weights import patch_loading, patch_reload, patch_streamer

    replace_embedding()
    patch_loading()
    patch_streamer()
    patch_reload()
    patch_saving()
