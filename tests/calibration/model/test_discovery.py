"""The generic path's view of models of transformers: the decoder, shared inputs, directions. No weights are made."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calibration.model import discovery
from calibration.model.architectures import Architecture
from calibration.model.discovery import architecture_of_form, choose_architecture, discover
from calibration.model.source import Source, TensorInfo
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.tiny_decoders import DECODERS
from tests.tiny_models import DECODER

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# By model_type: the column-parallel inputs, and the row-parallel linears.
STRUCTURES: dict[str, tuple[list[tuple[str, ...]], list[str]]] = {
    "granite": ([_QKV, _GATE_UP], ["self_attn.o_proj", "mlp.down_proj"]),
    "phi3": ([("self_attn.qkv_proj",), ("mlp.gate_up_proj",)], ["self_attn.o_proj", "mlp.down_proj"]),
    # No tensor-parallel plan.
    "stablelm": ([_QKV, _GATE_UP], ["self_attn.o_proj", "mlp.down_proj"]),
    "starcoder2": ([_QKV, ("mlp.c_fc",)], ["self_attn.o_proj", "mlp.c_proj"]),
    # Attention and MLP read the same tensor, but vLLM fuses them apart.
    "cohere": ([_QKV, _GATE_UP], ["self_attn.o_proj", "mlp.down_proj"]),
    "glm4": ([_QKV, ("mlp.gate_up_proj",)], ["self_attn.o_proj", "mlp.down_proj"]),
    "nemotron": ([_QKV, ("mlp.up_proj",)], ["self_attn.o_proj", "mlp.down_proj"]),
    "phi": ([_QKV, ("mlp.fc1",)], ["self_attn.dense", "mlp.fc2"]),
}


def source_of(directory: Path, model_class: str, settings: dict[str, Any], stored: str = "") -> Source:
    """The config and the tensors' headers of a model without weights, stored under `stored` for its own prefix."""
    cls = getattr(transformers, model_class)
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = cls.config_class(**{**DECODER, **tokens, **settings}, architectures=[model_class])
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = cls._from_config(config)
    tensors = {
        name.replace("model.", stored, 1) if stored else name: TensorInfo(directory / "f", "BF16", tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    return Source(directory, json.loads((directory / "config.json").read_text()), tensors)


def tiny(directory: Path, model_type: str, **changes: Any) -> Source:
    model_class, settings = DECODERS[model_type]
    return source_of(directory, model_class, {**settings, **changes})


@pytest.mark.parametrize(
    ("named", "built"),
    [
        ("Qwen2ForSequenceClassification", "Qwen2ForSequenceClassification"),
        ("Qwen2ForProcessRewardModel", "Qwen2Model"),
        ("Qwen2ForRewardModel", "Qwen2Model"),
    ],
)
def test_a_reward_model_is_discovered_even_if_its_head_is_remote_code(tmp_path: Path, named: str, built: str) -> None:
    made = source_of(tmp_path, "Qwen2ForSequenceClassification", {})
    source = Source(made.directory, {**made.config, "architectures": [named], "auto_map": {}}, made.tensors)
    found = choose_architecture(source, Recipe())
    assert (found.model_class, found.verified, found.block_prefixes) == (built, False, ("model.layers",))


@pytest.mark.parametrize("model_type", list(STRUCTURES))
def test_linears_are_grouped_by_what_they_read_and_where_they_lie(tmp_path: Path, model_type: str) -> None:
    found = discover(tiny(tmp_path, model_type), Recipe())
    columns, rows = STRUCTURES[model_type]
    assert [shared.shards for shared in found.shared_inputs if shared.parallel == "column"] == columns
    assert [shared.name for shared in found.shared_inputs if shared.parallel == "row"] == rows
    assert not any(shared.optional for shared in found.shared_inputs)
    assert (found.block_module, found.block_prefixes) == ("model.layers", ("model.layers",))
    assert not found.verified and not found.tuple_output
    assert found.decoder_config({})["num_hidden_layers"] == DECODERS[model_type][1].get("num_hidden_layers", 2)
    names = {shared.shards: shared.name for shared in found.shared_inputs}
    assert names.get(_QKV, "self_attn.qkv_proj") == "self_attn.qkv_proj"
    assert names.get(_GATE_UP, "mlp.gate_up_proj") == "mlp.gate_up_proj"


def test_inputs_come_in_the_order_in_which_they_are_computed(tmp_path: Path) -> None:
    found = discover(tiny(tmp_path, "granite"), Recipe())
    assert [shared.name.split(".")[1] for shared in found.shared_inputs] == [
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ]


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        # As Phi-3.5 and Phi-4-mini have it.
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}),
        ("granite", {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_angles_that_depend_on_the_largest_position_need_no_values(
    tmp_path: Path, model_type: str, rope: dict[str, Any]
) -> None:
    sizes = {"original_max_position_embeddings": 1024} if model_type == "phi3" else {}
    source = tiny(tmp_path, model_type, rope_parameters={"rope_theta": 10000.0, **rope}, **sizes)
    plain = discover(tiny(tmp_path / "plain", model_type), Recipe())
    assert discover(source, Recipe()).shared_inputs == plain.shared_inputs


def test_a_listed_type_keeps_its_profile_unless_the_decoder_is_named(tmp_path: Path) -> None:
    source = tiny(tmp_path, "mistral")
    assert choose_architecture(source, Recipe()).verified
    found = choose_architecture(source, Recipe(decoder="model.layers"))
    assert not found.verified
    assert found.shared_inputs == choose_architecture(source, Recipe()).shared_inputs


# As published for Gemma 3 4B and Qwen2-Audio 7B, whose configs leave out what their classes' defaults are.
SPARSE = {
    "gemma3": (
        {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34},
        {"num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2560},
    ),
    "qwen2_audio": (
        {"intermediate_size": 11008, "max_position_embeddings": 8192, "model_type": "qwen2", "vocab_size": 156032},
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096},
    ),
}


@pytest.mark.parametrize("model_type", SPARSE)
def test_sizes_that_a_listed_config_leaves_out_are_transformers_defaults(tmp_path: Path, model_type: str) -> None:
    written, expected = SPARSE[model_type]
    config = {"model_type": model_type, "text_config": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = choose_architecture(Source(tmp_path, config, {}), Recipe())
    assert found.verified
    sizes = found.decoder_config(config)
    assert {name: sizes[name] for name in expected} == expected
    # What the file says counts, even if transformers would read something else.
    assert all(sizes[name] == value for name, value in written.items())
    assert architecture_of_form(config, tmp_path) == found


def test_sizes_that_a_config_says_wrongly_are_named(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_attention_heads": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MorphoQuantError, match="num_attention_heads = 0 is not a positive integer"):
        choose_architecture(Source(tmp_path, config, {}), Recipe()).decoder_config(config)


def test_blocks_of_two_kinds_make_their_inputs_optional(tmp_path: Path) -> None:
    settings = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    found = discover(source_of(tmp_path, "Lfm2ForCausalLM", settings), Recipe())
    optional = {shared.name for shared in found.shared_inputs if shared.optional}
    assert optional == {"conv.in_proj", "conv.out_proj", "self_attn.qkv_proj", "self_attn.out_proj"}
    assert {shared.name for shared in found.shared_inputs} - optional == {
        *("feed_forward.w1_w3", "feed_forward.w2"),
    }


def test_blocks_that_return_tuples_are_noticed(tmp_path: Path) -> None:
    found = discover(source_of(tmp_path, "FalconForCausalLM", {}), Recipe())
    assert found.tuple_output and found.block_module == "transformer.h"
    assert [shared.parallel for shared in found.shared_inputs] == ["column", "row", "column", "row"]


def test_the_stored_prefix_may_differ_from_the_modules(tmp_path: Path) -> None:
    model_class, settings = DECODERS["granite"]
    found = discover(source_of(tmp_path, model_class, settings, stored="decoder."), Recipe())
    assert found.block_prefixes == ("decoder.layers",) and found.block_module == "model.layers"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "has no class 'NoSuchForCausalLM', which 'architectures' names"),
        ({"architectures": []}, "has no class ''"),
        (
            {"architectures": ["X"], "auto_map": {"AutoModel": "m.X"}},
            "X is code in .* only with --trust-remote-code",
        ),
        ({"num_local_experts": 4}, "'granite' is a mixture of experts, but no module of Granite"),
    ],
)
def test_what_transformers_does_not_build_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    source = tiny(tmp_path, "granite")
    with pytest.raises(MorphoQuantError, match=expected):
        choose_architecture(Source(tmp_path, {**source.config, **change}, source.tensors), Recipe())


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, "GPT2LMHeadModel", {})
    with pytest.raises(MorphoQuantError, match=r"GPT2LMHeadModel: no list of blocks with linears"):
        discover(source, Recipe())


def test_experts_are_refused_by_their_module_unless_they_stay_in_16_bit(tmp_path: Path) -> None:
    model_class = "MixtralForCausalLM"
    source = source_of(tmp_path, model_class, {"num_local_experts": 2})
    with pytest.raises(MorphoQuantError, match=r"model.layers.0.mlp.experts: a mixture .* --ignore '\*.experts.\*'"):
        discover(source, Recipe())
    found = discover(source, Recipe(ignore=("*.experts.*",)))
    # The router is no linear to quantize.
    assert [shared.name for shared in found.shared_inputs] == ["self_attn.qkv_proj", "self_attn.o_proj"]


def test_the_gates_of_experts_stay_in_16_bit(tmp_path: Path) -> None:
    settings = {"num_experts": 4, "shared_expert_intermediate_size": 64, "moe_intermediate_size": 64}
    source = source_of(tmp_path, "Qwen2MoeForCausalLM", settings)
    found = discover(source, Recipe(ignore=("*.experts.*",)))
    shards = [shard for shared in found.shared_inputs for shard in shared.shards]
    assert {"mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"} < set(shards)
    assert not {"mlp.gate", "mlp.shared_expert_gate"} & set(shards)


def test_the_matrix_that_vllm_multiplies_into_others_stays_in_16_bit(tmp_path: Path) -> None:
    found = discover(source_of(tmp_path, "YoutuForCausalLM", {"num_key_value_heads": 4}), Recipe())
    shards = {shard for shared in found.shared_inputs for shard in shared.shards}
    assert {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.o_proj"} < shards
    assert "self_attn.kv_b_proj" not in shards


def test_blocks_whose_buffers_transformers_computes_are_taken(tmp_path: Path) -> None:
    settings = {"n_layer": 2, "n_head": 4, "n_embd": 128, "rotary_dim": 16}
    found = discover(source_of(tmp_path, "GPTJForCausalLM", settings), Recipe())
    assert [shared.name for shared in found.shared_inputs] == [
        *("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    ]


def test_blocks_that_the_files_do_not_hold_whole_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Model()
    model.layers[1].register_buffer("table", torch.arange(4.0), persistent=False)
    with pytest.raises(MorphoQuantError, match=r"layers.1.table: a buffer that weight files do not hold and trans"):
        discover_model(monkeypatch, model)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    settings = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "forced_eos_token_id": None}
    with pytest.raises(MorphoQuantError, match=r"BartForConditionalGeneration: is an encoder-decoder"):
        discover(source_of(tmp_path, "BartForConditionalGeneration", settings), Recipe())


def test_files_that_hold_other_names_are_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path, "granite")
    with pytest.raises(MorphoQuantError, match=r"model.layers.0.self_attn.q_proj.weight: missing"):
        discover(Source(tmp_path, source.config, {}), Recipe())


@pytest.mark.parametrize("shared", [0, 1])
def test_blocks_that_read_the_keys_of_earlier_ones_are_refused(tmp_path: Path, shared: int) -> None:
    """Blocks of Gemma 4 share keys and values in its small sizes alone."""
    settings = {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["full_attention"] * 3,
        "num_kv_shared_layers": shared,
    }
    source = source_of(tmp_path, "Gemma4ForCausalLM", settings)
    if shared:
        with pytest.raises(MorphoQuantError, match=r"model.layers: later blocks read shared_kv_states of earlier one"):
            discover(source, Recipe())
    else:
        assert len(discover(source, Recipe()).shared_inputs) == 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.linear(hidden_states)


class _Model(nn.Module):
    """As much of a language model as discovery runs; `scale` is what it does to the states between blocks."""

    tp_plan = None
    config = SimpleNamespace()

    def _init_weights(self, module: nn.Module) -> None:
        """As of a model that computes no buffer."""

    def __init__(self, names: tuple[str, ...] = ("layers",), scale: float | None = None) -> None:
        super().__init__()
        self.names, self.scale = names, scale
        for name in names:
            self.add_module(name, nn.ModuleList([_Block(), _Block()]))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        states = torch.zeros(*input_ids.shape, 8, device=input_ids.device)
        for name in self.names:
            for block in getattr(self, name):
                states = block(states if self.scale is None else states * self.scale)
        return states


def discover_model(monkeypatch: pytest.MonkeyPatch, model: nn.Module, decoder: str = "") -> Architecture:
    monkeypatch.setattr(discovery, "empty_model", lambda *_: model.to("meta"))
    monkeypatch.setattr(discovery, "_sizes", lambda *_: {})
    shape = TensorInfo(Path("f"), "F32", (8, 8))
    stored = {f"{name}.weight": shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return discover(Source(Path("m"), {"architectures": ["LlamaForCausalLM"]}, stored), Recipe(decoder=decoder))


def test_two_lists_of_the_same_length_are_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Model(("first", "second"))
    with pytest.raises(
        MorphoQuantError, match=r"first and second are lists of 2 blocks each; name .* by --decoder first"
    ):
        discover_model(monkeypatch, model)
    assert discover_model(monkeypatch, model, decoder="second").block_module == "second"
    with pytest.raises(MorphoQuantError, match=r"--decoder: third is not a list .*; the model has: first, second"):
        discover_model(monkeypatch, model, decoder="third")


def test_a_model_that_changes_the_states_between_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert discover_model(monkeypatch, _Model()).block_module == "layers"
    with pytest.raises(MorphoQuantError, match=r"layers.1: the model changes the hidden states between blocks"):
        discover_model(monkeypatch, _Model(scale=0.5))
