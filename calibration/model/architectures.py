"""The verified architectures: their decoder blocks, and the linears that share an input."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class SharedInput:
    """Linears of a decoder block that read the same activation; the engine fuses them into `name`."""

    name: str
    shards: tuple[str, ...]
    # Direction in which tensor parallelism splits them, as in schema.LayerSpec.parallel.
    parallel: str
    # Whether some blocks lack these linears, as in hybrid decoders.
    optional: bool = False


@dataclass(frozen=True)
class Tower:
    """An encoder of media whose linears can be quantized on request; its patches have no token ids."""

    # Name of the tower in a recipe. The row of this name serves all of its patches, including video frames.
    name: str
    # Module of the model class, and the list of its blocks below it.
    module: str
    block_module: str
    # Names of that list in the weight files; some models were published under several names.
    block_prefixes: tuple[str, ...]
    shared_inputs: tuple[SharedInput, ...]


_DECODER_BLOCK = (
    SharedInput("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "column"),
    SharedInput("self_attn.o_proj", ("self_attn.o_proj",), "row"),
    SharedInput("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "column"),
    SharedInput("mlp.down_proj", ("mlp.down_proj",), "row"),
)
# Blocks have full or linear attention. The linears in_proj_b and in_proj_a read the same input. Their few outputs stay
# in 16 bit, as vLLM's in_proj_ba: they set the decay of a state that every later token reads.
_GATED_DELTA_NET_BLOCK = (
    SharedInput("linear_attn.in_proj_qkvz", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "column", True),
    SharedInput("linear_attn.out_proj", ("linear_attn.out_proj",), "row", True),
    *(replace(shared, optional=shared.name.startswith("self_attn.")) for shared in _DECODER_BLOCK),
)
_TOWER_BLOCK = (
    SharedInput("attn.proj", ("attn.proj",), "row"),
    SharedInput("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "column"),
    SharedInput("mlp.down_proj", ("mlp.down_proj",), "row"),
)
# A block has experts or a dense MLP.
_EXPERTS = "mlp.experts"
_EXPERTS_BLOCK = (*_DECODER_BLOCK[:2], *(replace(shared, optional=True) for shared in _DECODER_BLOCK[2:]))
# Qwen2.5-Omni's files hold q, k and v separately, Qwen2.5-VL's as one matrix.
_SPLIT_TOWER_BLOCK = (SharedInput("attn.qkv", ("attn.q", "attn.k", "attn.v"), "column"), *_TOWER_BLOCK)
_FUSED_TOWER_BLOCK = (SharedInput("attn.qkv", ("attn.qkv",), "column"), *_TOWER_BLOCK)
# Qwen3-VL's MLP has no gate.
_QWEN3_TOWER_BLOCK = (
    SharedInput("attn.qkv", ("attn.qkv",), "column"),
    SharedInput("attn.proj", ("attn.proj",), "row"),
    SharedInput("mlp.linear_fc1", ("mlp.linear_fc1",), "column"),
    SharedInput("mlp.linear_fc2", ("mlp.linear_fc2",), "row"),
)


@dataclass(frozen=True)
class Architecture:
    """One model_type of config.json."""

    model_type: str
    # Class of transformers that holds the language model and the towers whose output it reads.
    model_class: str
    # Module of that class that lists the decoder blocks.
    block_module: str
    # Names of that list in the weight files; some models were published under several names.
    block_prefixes: tuple[str, ...]
    # Keys from config.json to the object with the media token ids, and from there to the decoder's config.
    media_config: tuple[str, ...] = ()
    text_config: tuple[str, ...] = ()
    # Modalities in addition to text.
    media: tuple[str, ...] = ()
    # Modules of that class that encode media; also the prefixes of their tensors in the weight files.
    towers: tuple[str, ...] = ()
    tower_prefixes: tuple[str, ...] = ()
    # Prefix of that class's tensors in the weight files.
    model_prefix: str = ""
    shared_inputs: tuple[SharedInput, ...] = _DECODER_BLOCK
    # Towers that can be quantized on request. Qwen's audio towers cannot: vLLM runs them as modules of transformers,
    # which no quantization method reaches.
    quantizable_towers: tuple[Tower, ...] = ()
    # False for an architecture that `discovery` found: it is taken by the generic path.
    verified: bool = True
    # The decoder's sizes as transformers reads them, if config.json spells them in its own way or leaves some out.
    sizes: Mapping[str, Any] | None = None
    # The class in the model's directory, as auto_map names it, if transformers has none of this name.
    remote_code: str = ""
    # Whether a block returns a tuple that begins with the hidden states.
    tuple_output: bool = False
    # Module of a block that holds its routed experts, which can be quantized; some blocks may lack it.
    experts: str = ""

    def decoder_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that describes the decoder.

        Raises MorphoQuantError if it is missing, or if its num_hidden_layers or num_attention_heads is not a positive
        integer. The same holds for num_key_value_heads, if present.
        """
        if self.sizes is not None:
            check_counts(self.sizes)
            return self.sizes
        part = self.written_config(config)
        if "num_hidden_layers" not in part:
            raise MorphoQuantError(
                f"config.json: no num_hidden_layers for model_type '{self.model_type}'; is it complete?"
            )
        check_counts(part)
        return part

    def written_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What config.json itself says of the decoder; empty if it says nothing."""
        parts = [_descend(config, path) or {} for path in (self.text_config, self.media_config)]
        return next((part for part in parts if "num_hidden_layers" in part), parts[0])

    def tower(self, name: str) -> Tower:
        """The tower that a recipe names; MorphoQuantError if this architecture has none of that name."""
        for tower in self.quantizable_towers:
            if tower.name == name:
                return tower
        raise MorphoQuantError(
            f"towers: model_type '{self.model_type}' has no {name} tower that can be quantized; leave it out"
        )

    def placeholder_token_ids(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Token ids that stand for a modality in input_ids, by row name; MorphoQuantError if one is missing."""
        part = _descend(config, self.media_config) or {}
        ids: dict[str, tuple[int, ...]] = {}
        for row in self.media:
            token = next((part[key] for key in (f"{row}_token_id", f"{row}_token_index") if key in part), None)
            if not isinstance(token, int):
                raise MorphoQuantError(f"config.json: no {row}_token_id for model_type '{self.model_type}'")
            ids[row] = (token,)
        return ids


def _prefixes(*modules: str) -> tuple[str, ...]:
    """The names of these modules' tensors in the files of older and newer versions of transformers."""
    return tuple(f"{outer}{module}." for module in modules for outer in ("", "model."))


ARCHITECTURES = (
    Architecture(
        model_type="qwen2_5_omni",
        model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        block_module="model.layers",
        block_prefixes=("thinker.model.layers",),
        media_config=("thinker_config",),
        text_config=("thinker_config", "text_config"),
        media=("image", "video", "audio"),
        quantizable_towers=(Tower("image", "visual", "visual.blocks", ("thinker.visual.blocks",), _SPLIT_TOWER_BLOCK),),
        towers=("audio_tower", "visual"),
        tower_prefixes=("thinker.audio_tower.", "thinker.visual."),
        model_prefix="thinker.",
    ),
    Architecture(
        model_type="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("model.layers", "model.language_model.layers"),
        # Older configs hold the decoder's settings at the top level, newer ones under text_config.
        text_config=("text_config",),
        media=("image", "video"),
        quantizable_towers=(
            Tower(
                name="image",
                module="model.visual",
                block_module="model.visual.blocks",
                block_prefixes=("visual.blocks", "model.visual.blocks"),
                shared_inputs=_FUSED_TOWER_BLOCK,
            ),
        ),
        towers=("model.visual",),
        tower_prefixes=("visual.", "model.visual."),
    ),
    Architecture(
        model_type="qwen3_vl",
        model_class="Qwen3VLForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("model.language_model.layers",),
        text_config=("text_config",),
        media=("image", "video"),
        quantizable_towers=(
            Tower("image", "model.visual", "model.visual.blocks", ("model.visual.blocks",), _QWEN3_TOWER_BLOCK),
        ),
        towers=("model.visual",),
        tower_prefixes=("model.visual.",),
    ),
    Architecture(
        model_type="qwen3_omni_moe",
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        block_module="model.layers",
        block_prefixes=("thinker.model.layers",),
        media_config=("thinker_config",),
        text_config=("thinker_config", "text_config"),
        media=("image", "video", "audio"),
        towers=("audio_tower", "visual"),
        tower_prefixes=("thinker.audio_tower.", "thinker.visual."),
        model_prefix="thinker.",
        shared_inputs=_EXPERTS_BLOCK,
        experts=_EXPERTS,
    ),
    Architecture(
        model_type="qwen3_vl_moe",
        model_class="Qwen3VLMoeForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("model.language_model.layers",),
        text_config=("text_config",),
        media=("image", "video"),
        towers=("model.visual",),
        tower_prefixes=("model.visual.",),
        shared_inputs=_EXPERTS_BLOCK,
        experts=_EXPERTS,
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "model.layers",
        ("model.layers",),
        shared_inputs=_EXPERTS_BLOCK,
        experts=_EXPERTS,
    ),
    Architecture(
        model_type="qwen3_5",
        model_class="Qwen3_5ForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("model.language_model.layers",),
        text_config=("text_config",),
        media=("image", "video"),
        towers=("model.visual",),
        tower_prefixes=("model.visual.",),
        shared_inputs=_GATED_DELTA_NET_BLOCK,
    ),
    Architecture(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        "model.layers",
        ("model.layers", "model.language_model.layers"),
        shared_inputs=_GATED_DELTA_NET_BLOCK,
    ),
    Architecture(
        model_type="gemma3",
        model_class="Gemma3ForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("language_model.model.layers", "model.language_model.layers"),
        text_config=("text_config",),
        media=("image",),
        towers=("model.vision_tower", "model.multi_modal_projector"),
        tower_prefixes=_prefixes("vision_tower", "multi_modal_projector"),
    ),
    # In transformers' layout; the publisher's own (internvl_chat) is code in the model's directory.
    Architecture(
        model_type="internvl",
        model_class="InternVLForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("language_model.model.layers", "model.language_model.layers"),
        text_config=("text_config",),
        media=("image",),
        towers=("model.vision_tower", "model.multi_modal_projector"),
        tower_prefixes=_prefixes("vision_tower", "multi_modal_projector"),
    ),
    Architecture(
        model_type="qwen2_audio",
        model_class="Qwen2AudioForConditionalGeneration",
        block_module="model.language_model.layers",
        block_prefixes=("language_model.model.layers", "model.language_model.layers"),
        text_config=("text_config",),
        media=("audio",),
        towers=("model.audio_tower", "model.multi_modal_projector"),
        tower_prefixes=_prefixes("audio_tower", "multi_modal_projector"),
    ),
    Architecture("gemma3_text", "Gemma3ForCausalLM", "model.layers", ("model.layers",)),
    Architecture("llama", "LlamaForCausalLM", "model.layers", ("model.layers",)),
    Architecture("ministral3", "Ministral3ForCausalLM", "model.layers", ("model.layers",)),
    Architecture("mistral", "MistralForCausalLM", "model.layers", ("model.layers",)),
    Architecture("qwen2", "Qwen2ForCausalLM", "model.layers", ("model.layers",)),
    Architecture("qwen3", "Qwen3ForCausalLM", "model.layers", ("model.layers",)),
)


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The verified architecture of a config.json.

    Raises MorphoQuantError naming the model_type if it is unknown.
    """
    architecture = known_architecture(config)
    if architecture is None:
        raise MorphoQuantError(
            f"config.json: model_type {config.get('model_type')!r} is not supported; supported: {_known()}"
        )
    return architecture


def known_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The verified architecture of a config.json; None if its model_type is not listed."""
    return next((item for item in ARCHITECTURES if item.model_type == config.get("model_type")), None)


def _known() -> str:
    return ", ".join(architecture.model_type for architecture in ARCHITECTURES)


def check_counts(decoder_config: Mapping[str, Any], optional: Container[str] = ("num_key_value_heads",)) -> None:
    """Raise MorphoQuantError if a number of blocks or heads is not a positive integer; some may be missing."""
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        value = decoder_config.get(key)
        if value is None and key in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = f"{key} = {value!r} is not a positive integer" if key in decoder_config else f"no {key}"
            raise MorphoQuantError(f"config.json: {problem}; download it again")


def _descend(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    part: Any = config
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else None
