from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.model.architectures import find_architecture
from calibration.model.plan import check_carried, decoder_names, matches, plan, sixteen_bit
from calibration.model.source import TensorInfo
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}


def headers(hidden: int = 256, intermediate: int = 512, prefix: str = "model.layers") -> dict[str, TensorInfo]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    tensors = {"lm_head.weight": (64, hidden), "visual.blocks.0.mlp.down_proj.weight": (hidden, hidden)}
    for block in range(2):
        tensors |= {f"{prefix}.{block}.{name}.weight": shape for name, shape in shapes.items()}
        tensors[f"{prefix}.{block}.self_attn.q_proj.bias"] = (hidden,)
        tensors[f"{prefix}.{block}.input_layernorm.weight"] = (hidden,)
    return {name: TensorInfo(Path("f"), "BF16", shape) for name, shape in tensors.items()}


def make_plan(
    tensors: dict[str, TensorInfo] | None = None, config: dict[str, Any] | None = None, **settings: Any
) -> QuantizationSpec:
    config = CONFIG | (config or {})
    return plan(find_architecture(config), config, tensors or headers(), Recipe(**settings))


def test_every_decoder_linear_is_planned_by_default() -> None:
    spec = make_plan()
    assert len(spec.layers) == 14
    query, down = spec.layers["model.layers.1.self_attn.q_proj"], spec.layers["model.layers.0.mlp.down_proj"]
    assert (query.in_features, query.out_features, query.parallel, query.bias) == (256, 256, "column", True)
    assert query.shared_input == "model.layers.1.self_attn.qkv_proj"
    assert (down.in_features, down.out_features, down.parallel, down.bias) == (512, 256, "row", False)
    assert spec.layers["model.layers.0.mlp.up_proj"].shared_input == "model.layers.0.mlp.gate_up_proj"


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "group_size", "expected"),
    [
        (256, 8, 4, 32, 8),
        (256, 8, 4, 64, 4),  # o_proj: K = 256 holds four groups of 64
        (256, 8, 3, 32, 1),  # three KV heads neither divide nor are divided by 8, 4 or 2
        (256, 12, 4, 32, 4),  # twelve heads
        (576, 9, 3, 32, 1),  # SmolLM2-135M
    ],
)
def test_automatic_tensor_parallel(hidden: int, heads: int, kv_heads: int, group_size: int, expected: int) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    spec = make_plan(headers(hidden, 1024), config, group_size=group_size)
    assert spec.tensor_parallel == expected


def test_a_chosen_tensor_parallel_is_checked() -> None:
    assert make_plan(tensor_parallel=2).tensor_parallel == 2
    with pytest.raises(MorphoQuantError, match="o_proj: tensor parallel size 3 breaks a group"):
        make_plan(tensor_parallel=3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 3)])
def test_a_chosen_tensor_parallel_must_divide_the_heads(heads: int, kv_heads: int) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    expected = f"tensor_parallel = 4: {heads} attention heads and {kv_heads} key-value heads cannot be divided among"
    with pytest.raises(MorphoQuantError, match=expected):
        make_plan(config=config, tensor_parallel=4)
    # Fewer key-value heads than ranks are copied.
    assert make_plan(config={"num_key_value_heads": 2}, tensor_parallel=4).tensor_parallel == 4


def test_levels_of_scales_choose_the_scheme_of_every_layer() -> None:
    schemes = {
        levels: {layer.scale_scheme for layer in make_plan(scale_levels=levels).layers.values()}
        for levels in (0, 1, 16)
    }
    assert schemes == {0: {"group"}, 1: {"two_level"}, 16: {"two_level"}}


def test_patterns_choose_layers() -> None:
    spec = make_plan(targets=("model.layers.*_proj",), ignore=("model.layers.0.*", "re:.*o_proj"))
    assert all(name.startswith("model.layers.1.") and "o_proj" not in name for name in spec.layers)
    assert len(spec.layers) == 6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": ("*.qq_proj",)}, r"targets: '\*.qq_proj' matches no layer"),
        ({"ignore": ("*.qq_proj",)}, r"ignore: '\*.qq_proj' matches no layer"),
        ({"targets": ("re:(",)}, "is not a regular expression"),
        ({"ignore": ("model.*",)}, "no layer is left"),
        ({"targets": ("*.q_proj",)}, "layers.0.self_attn.qkv_proj: its shards .* leave out .*k_proj.*v_proj"),
        ({"ignore": ("*.1.mlp.up_proj",)}, "layers.1.mlp.gate_up_proj: its shards"),
        ({"targets": ("lm_head",)}, "lm_head is outside the language model's decoder"),
        ({"targets": ("*.down_proj",)}, "visual.blocks.0.mlp.down_proj is outside"),
    ],
)
def test_patterns_that_cannot_be_served_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(MorphoQuantError, match=expected):
        make_plan(**settings)


def test_a_group_size_that_does_not_divide_is_refused_before_any_work() -> None:
    with pytest.raises(MorphoQuantError, match=r"q_proj: K = 576 is not divisible by group_size 128; choose .*32, 64"):
        make_plan(headers(576, 1024), group_size=128)


def test_qwen2_5_vl_is_found_under_both_names() -> None:
    config = {"model_type": "qwen2_5_vl", "image_token_id": 5, "video_token_id": 6}
    assert "model.layers.0.mlp.up_proj" in make_plan(config=config).layers
    spec = make_plan(headers(prefix="model.language_model.layers"), config)
    assert "model.language_model.layers.0.mlp.up_proj" in spec.layers
    assert spec.placeholder_token_ids == {"image": (5,), "video": (6,)}


def test_weights_that_do_not_fit_the_config_are_refused() -> None:
    with pytest.raises(MorphoQuantError, match=r"layers.2.self_attn.q_proj.weight: missing; .*3 blocks"):
        make_plan(config={"num_hidden_layers": 3})
    tensors = headers()
    tensors["model.layers.1.mlp.up_proj.weight"] = TensorInfo(Path("f"), "I8", (4, 4))
    with pytest.raises(MorphoQuantError, match=r"up_proj.weight: I8"):
        make_plan(tensors)


def test_matching() -> None:
    assert matches("a.b.down_proj", ["x", "*.down_proj"])
    assert matches("a.b.down_proj", [r"re:a\..*down_proj"])
    assert not matches("a.b.down_proj", ["down_proj", "re:a", "*.DOWN_PROJ"])


def test_linears_whose_k_no_group_divides_stay_in_16_bit() -> None:
    tensors = headers(intermediate=3420)
    spec = make_plan(tensors)
    assert len(spec.layers) == 12 and "model.layers.0.mlp.up_proj" in spec.layers
    llama = find_architecture(CONFIG)
    kept = sixteen_bit(llama, decoder_names(llama, CONFIG, tensors), tensors)
    assert kept == {f"model.layers.{block}.mlp.down_proj": 3420 for block in range(2)}
    with pytest.raises(MorphoQuantError, match=r"model.layers: no linear is left to quantize: none of \[32, 64, 128\]"):
        make_plan(tensors, targets=("model.*.down_proj",))


def test_optional_linears_are_planned_in_the_blocks_that_have_them() -> None:
    tensors = headers()
    for shard in "qkv":
        del tensors[f"model.layers.1.self_attn.{shard}_proj.weight"]
    llama = find_architecture(CONFIG)
    hybrid = replace(
        llama, shared_inputs=tuple(replace(shared, optional="qkv" in shared.name) for shared in llama.shared_inputs)
    )
    spec = plan(hybrid, CONFIG, tensors, Recipe())
    assert len(spec.layers) == 11 and "model.layers.0.self_attn.q_proj" in spec.layers
    with pytest.raises(MorphoQuantError, match=r"model.layers.1.self_attn.q_proj.weight: missing"):
        make_plan(tensors)


EXPERTS_CONFIG = {"model_type": "qwen3_moe", "hidden_act": "silu"}


def with_experts(inner: int = 64, hidden: int = 256) -> dict[str, TensorInfo]:
    """Block 1 has three experts instead of a dense MLP."""
    tensors = {name: info for name, info in headers(hidden).items() if ".1.mlp." not in name}
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for expert in range(3):
        for kind, shape in shapes.items():
            tensors[f"model.layers.1.mlp.experts.{expert}.{kind}.weight"] = TensorInfo(Path("f"), "BF16", shape)
    return tensors | {"model.layers.1.mlp.gate.weight": TensorInfo(Path("f"), "BF16", (3, hidden))}


def test_experts_are_planned_beside_dense_blocks() -> None:
    spec = make_plan(with_experts(), EXPERTS_CONFIG)
    assert len(spec.layers) == 11
    ((name, experts),) = spec.experts.items()
    assert name == "model.layers.1.mlp.experts"
    assert (experts.count, experts.in_features, experts.intermediate_features) == (3, 256, 64)
    assert (experts.group_size, experts.scale_scheme) == (32, "two_level")
    assert spec.tensor_parallel == 2
    # The router is no layer.
    assert not any(layer.endswith("mlp.gate") for layer in spec.linears)


def test_auto_tensor_parallel_leaves_the_groups_of_experts_whole() -> None:
    assert make_plan(with_experts(inner=32), EXPERTS_CONFIG).tensor_parallel == 1
    assert make_plan(with_experts(inner=256), EXPERTS_CONFIG).tensor_parallel == 2


def test_experts_stay_in_16_bit_by_pattern() -> None:
    spec = make_plan(with_experts(), EXPERTS_CONFIG, ignore=("*.experts.*",))
    assert spec.experts == {} and len(spec.layers) == 11
    only = make_plan(with_experts(), EXPERTS_CONFIG, targets=("*.experts.*",))
    assert list(only.experts) == ["model.layers.1.mlp.experts"] and only.layers == {}


def test_experts_of_a_block_are_quantized_together() -> None:
    with pytest.raises(
        MorphoQuantError, match=r"layers.1.mlp.experts: its experts .* leave out \S*experts.0.down_proj"
    ):
        make_plan(with_experts(), EXPERTS_CONFIG, ignore=("*.0.down_proj",))


def test_experts_whose_k_no_group_size_divides_stay_in_16_bit() -> None:
    spec = make_plan(with_experts(inner=48), EXPERTS_CONFIG)
    assert spec.experts == {} and len(spec.layers) == 11
    with pytest.raises(MorphoQuantError, match=r"experts.0.down_proj: K = 96 is not divisible by group_size 64"):
        make_plan(with_experts(inner=96), EXPERTS_CONFIG, group_size=64)


def test_experts_of_another_kind_are_refused_or_ignored() -> None:
    config = EXPERTS_CONFIG | {"hidden_act": "gelu"}
    with pytest.raises(MorphoQuantError, match=r"layers.1.mlp.experts: experts of this kind are not served in 4 bit"):
        make_plan(with_experts(), config)
    assert make_plan(with_experts(), config, ignore=("*.experts.*",)).experts == {}


def test_blocks_of_qwen3_5_have_full_or_linear_attention() -> None:
    prefix = "model.language_model.layers"
    tensors = headers(prefix=prefix)
    for shard in "qkvo":
        del tensors[f"{prefix}.0.self_attn.{shard}_proj.weight"]
    linear = {"in_proj_qkv": (512, 256), "in_proj_z": (256, 256), "in_proj_b": (4, 256), "out_proj": (256, 256)}
    for name, shape in linear.items():
        tensors[f"{prefix}.0.linear_attn.{name}.weight"] = TensorInfo(Path("f"), "BF16", shape)
    config = {"model_type": "qwen3_5", "image_token_id": 5, "video_token_id": 6}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    spec = make_plan(tensors, {**config, "text_config": {**CONFIG, **heads}})
    assert sorted(name.removeprefix(f"{prefix}.0.") for name in spec.layers if name.startswith(f"{prefix}.0.")) == [
        *(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")),
        *(f"mlp.{name}_proj" for name in ("down", "gate", "up")),
    ]
    assert len(spec.layers) == 6 + 7
    layer = spec.layers[f"{prefix}.0.linear_attn.in_proj_z"]
    assert (layer.parallel, layer.shared_input) == ("column", f"{prefix}.0.linear_attn.in_proj_qkvz")
    assert spec.layers[f"{prefix}.0.linear_attn.out_proj"].parallel == "row"
    # Two key heads of linear attention, although four ranks could share the others.
    assert spec.tensor_parallel == 2
    with pytest.raises(MorphoQuantError, match=r"2 key heads of linear attention and 4 value heads .* among 4 ranks"):
        make_plan(tensors, {**config, "text_config": {**CONFIG, **heads}}, tensor_parallel=4)


def test_tensors_that_a_checkpoint_cannot_hold_are_refused_before_the_work(tmp_path: Path) -> None:
    layers = {"model.layers.0.self_attn.k_proj": LayerSpec(64, 32, 32, "column", "model.layers.0.self_attn.k_proj")}
    spec = QuantizationSpec(layers=layers, tensor_parallel=1, placeholder_token_ids={}, created_by="")

    def check(name: str, dtype: str = "BF16") -> None:
        check_carried({name: TensorInfo(tmp_path / "f", dtype, (32,))}, spec)

    for name in ("k_proj.weight", "k_proj.bias", "o_proj.weight", "k_norm.weight"):
        check(f"model.layers.0.self_attn.{name}")
    for name in ("k_proj.zero_point", "k_proj.deep.weight", "o_proj.gain", "k_proj.weight_scale"):
        with pytest.raises(MorphoQuantError, match=rf"{name} has a name that means something else in a checkpoint"):
            check(f"model.layers.0.self_attn.{name}")
    with pytest.raises(MorphoQuantError, match=r"k_proj.bias has the dtype F64; store it as one of F32, BF16, F16, or"):
        check("model.layers.0.self_attn.k_proj.bias", "F64")
