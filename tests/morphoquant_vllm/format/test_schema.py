"""The rules of the format, one by one; and the imports of schema, numerics and checkpoint reader."""

import inspect
import json

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import (
    INPUT_TENSORS,
    MAX_TWO_LEVEL_CHANNELS,
    OUTPUT_TENSORS,
    LayerSpec,
    TensorSpec,
    allowed_tensor_parallel,
    check_group_size,
    check_tensor_parallel,
    input_blocks,
    scale_scheme_of,
    tensor_specs,
)
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.values import check_massive_channels, check_order, unequal_input_tensors
from morphoquant_vllm.numerics.activation import activation_record
from morphoquant_vllm.numerics.limits import GROUP_SIZES, MAX_LEVEL
from morphoquant_vllm.numerics.linear import weight_record
from tests.checkpoints import layer_specs

LAYER = LayerSpec(in_features=128, out_features=48, group_size=64, parallel="row", shared_input="a.down", bias=True)


def test_config_survives_json() -> None:
    spec = QuantizationSpec(
        layers=layer_specs(),
        rows=("text", "any", "massive"),
        tensor_parallel=2,
        placeholder_token_ids={"text": (1, 2)},
        created_by="me",
    )
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_any_row_and_shared_inputs() -> None:
    spec = QuantizationSpec(layers=layer_specs(1), rows=("any", "text", "massive"))
    assert spec.any_row == 0
    assert spec.shared_inputs()["model.layers.0.self_attn.qkv_proj"] == [
        f"model.layers.0.self_attn.{shard}_proj" for shard in "qkv"
    ]


@pytest.mark.parametrize("rows", [("text",), ("any", "any"), ()])
def test_rows_must_be_distinct_and_hold_any(rows: tuple[str, ...]) -> None:
    with pytest.raises(MorphoQuantError, match="rows must be distinct"):
        QuantizationSpec(layers={"a.down": LAYER}, rows=rows)


@pytest.mark.parametrize("rows", [("text", "any"), ("massive", "any"), ("text", "massive", "any")])
def test_the_last_row_must_be_the_massive_one(rows: tuple[str, ...]) -> None:
    with pytest.raises(MorphoQuantError, match="the last row must be 'massive'"):
        QuantizationSpec(layers={"a.down": LAYER}, rows=rows)


def test_an_older_version_is_refused_with_the_remedy() -> None:
    config = QuantizationSpec(layers={"a.down": LAYER}).to_dict() | {"format_version": 1}
    with pytest.raises(MorphoQuantError, match=r"format_version 1 is unknown.*knows 2.*calibrate again"):
        QuantizationSpec.from_dict(config)


def test_a_fixed_row_is_a_modalitys_and_stands_in_the_file_only_where_there_is_one() -> None:
    tower = LayerSpec(**{**vars(LAYER), "shared_input": "tower.down", "fixed_row": "image"})
    spec = QuantizationSpec(layers={"a.down": LAYER, "tower.down": tower})
    stored = spec.to_dict()["layers"]
    assert stored["tower.down"]["fixed_row"] == "image" and "fixed_row" not in stored["a.down"]
    assert QuantizationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for row in ("massive", "smell"):
        with pytest.raises(MorphoQuantError, match=f"tower.down: fixed_row '{row}' is not a modality's row"):
            QuantizationSpec(layers={"tower.down": LayerSpec(**{**vars(tower), "fixed_row": row})})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("in_features", 256),
        ("group_size", 64),
        ("parallel", "row"),
        ("scale_scheme", "two_level"),
        ("fixed_row", "image"),
        ("weight_bits", 8),
    ],
)
def test_shards_must_agree_on_what_they_share(setting: str, value: object) -> None:
    layers = layer_specs(1)
    name = "model.layers.0.self_attn.v_proj"
    layers[name] = LayerSpec(**{**vars(layers[name]), setting: value})
    with pytest.raises(MorphoQuantError, match=name):
        QuantizationSpec(layers=layers)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("parallel", "diagonal", "'diagonal' is unknown"),
        ("in_features", 0, "must be positive"),
        ("out_features", -1, "must be positive"),
        ("out_features", 48.0, "out_features must be int"),
        ("group_size", True, "group_size must be int"),
        ("shared_input", None, "shared_input must be str"),
    ],
)
def test_layer_settings(setting: str, value: object, message: str) -> None:
    with pytest.raises(MorphoQuantError, match=f"^a.down: .*{message}"):
        LayerSpec(**{**vars(LAYER), setting: value}).check("a.down")


def test_group_size_message_names_what_would_do() -> None:
    for size in GROUP_SIZES:
        check_group_size("a", 3584, size)
    with pytest.raises(MorphoQuantError, match=r"K = 576 .*choose group_size from \[32, 64\]"):
        check_group_size("a", 576, 128)
    with pytest.raises(MorphoQuantError, match="leave this layer in 16 bit"):
        check_group_size("visual.down_proj", 3420, 32)


@pytest.mark.parametrize(("group_size", "largest"), [(128, 4), (64, 8), (32, 16)])
def test_tensor_parallel_sizes_of_the_7b_down_proj(group_size: int, largest: int) -> None:
    # K = 18944 = 2^9 * 37: 37 itself is a size too, and so are its small multiples.
    assert max(size for size in allowed_tensor_parallel(18944, group_size) if size % 37) == largest
    check_tensor_parallel("down", 18944, group_size, largest)
    with pytest.raises(MorphoQuantError, match=f"size {largest * 2} breaks a group.*allowed sizes: \\[1, 2, 4"):
        check_tensor_parallel("down", 18944, group_size, largest * 2)


def test_tensor_parallel_binds_row_parallel_layers_only() -> None:
    LayerSpec(**{**vars(LAYER), "parallel": "column"}).check("a", tensor_parallel=64)
    with pytest.raises(MorphoQuantError, match="breaks a group"):
        LAYER.check("a", tensor_parallel=64)


def test_tensor_specs_cover_input_and_output_tensors() -> None:
    specs = tensor_specs(LAYER, rows=6, tensor_parallel=2)
    assert set(specs) == {*INPUT_TENSORS, *OUTPUT_TENSORS["group"]}
    assert (specs["weight_codes"].dtype, specs["weight_codes"].shape) == (torch.uint8, (48, 64))
    assert (specs["weight_scale"].dtype, specs["weight_scale"].shape) == (torch.bfloat16, (48, 2))
    assert (specs["absorbed_bias"].dtype, specs["absorbed_bias"].shape) == (torch.float32, (2, 6, 48))
    assert (specs["massive_channel"].dtype, specs["massive_channel"].shape) == (torch.int32, (2, 4))
    assert specs["massive_low"] == specs["massive_high"] == TensorSpec(torch.float32, (2, 4))


def test_two_level_scales_stand_in_the_place_of_group_scales() -> None:
    group = tensor_specs(LAYER, rows=6, tensor_parallel=2)
    layer = LayerSpec(**{**vars(LAYER), "scale_scheme": "two_level"})
    specs = tensor_specs(layer, rows=6, tensor_parallel=2)
    assert set(specs) == {*INPUT_TENSORS, *OUTPUT_TENSORS["two_level"]}
    assert specs["weight_level"] == TensorSpec(torch.uint8, (48, 2))
    assert specs["weight_channel_scale"] == TensorSpec(torch.float32, (48,))
    assert all(specs[name] == group[name] for name in specs.keys() & group.keys())
    assert [scale_scheme_of(names) for names in (group, specs)] == ["group", "two_level"]


def test_eight_bit_weights_stand_in_the_place_of_packed_ones() -> None:
    specs = tensor_specs(LAYER, rows=6, tensor_parallel=2)
    wide = tensor_specs(LayerSpec(**{**vars(LAYER), "weight_bits": 8}), rows=6, tensor_parallel=2)
    assert wide["weight_codes"] == TensorSpec(torch.int8, (48, 128))
    assert wide | {"weight_codes": specs["weight_codes"]} == specs


def test_eight_bit_weights_have_group_scales() -> None:
    """With levels, the sum over a long K leaves an int32: 128 * 128 * 16 * K."""
    layer = vars(LAYER) | {"weight_bits": 8}
    LayerSpec(**layer).check("a.down")
    with pytest.raises(MorphoQuantError, match=r"^a\.down: weight_bits 8 goes with scale_scheme 'group' alone"):
        LayerSpec(**{**layer, "scale_scheme": "two_level"}).check("a.down")


def test_output_tensors_stand_in_the_order_of_the_record() -> None:
    """Callers splat them into weight_record."""
    arguments = list(inspect.signature(weight_record).parameters)
    for scheme, names in OUTPUT_TENSORS.items():
        for argument, tensor in zip(arguments, names, strict=scheme == "two_level"):
            assert tensor in (argument, f"weight_{argument}") or (argument, tensor) == ("scale", "weight_level")


def test_sums_over_k_of_two_level_layers_fit_an_int32() -> None:
    """Whatever codes, weights and levels: the largest product of each is -128."""
    fits, over = 131_040, 131_072
    assert over > MAX_TWO_LEVEL_CHANNELS >= fits and 128 * 8 * MAX_LEVEL * over >= 2**31 > 128 * 8 * MAX_LEVEL * fits
    layer = vars(LAYER) | {"group_size": 32, "scale_scheme": "two_level"}
    LayerSpec(**{**layer, "in_features": fits}).check("a.down")
    with pytest.raises(MorphoQuantError, match=r"^a\.down: K = 131072 is over 131071.*use scale_scheme 'group'"):
        LayerSpec(**{**layer, "in_features": over}).check("a.down")
    LayerSpec(**{**layer, "in_features": over, "scale_scheme": "group"}).check("a.down")


@pytest.mark.parametrize(("parallel", "blocks"), [("row", 2), ("column", 1)])
def test_only_layers_cut_along_k_have_blocks(parallel: str, blocks: int) -> None:
    layer = LayerSpec(**{**vars(LAYER), "parallel": parallel})
    assert input_blocks(layer, 2) == blocks
    specs = tensor_specs(layer, rows=6, tensor_parallel=2)
    for tensor in ("massive_channel", "massive_low", "massive_high", "absorbed_bias"):
        assert specs[tensor].shape[0] == blocks
    assert specs == tensor_specs(layer, rows=6, tensor_parallel=2 if parallel == "row" else 64)


def test_input_tensors_stand_in_the_order_of_the_record() -> None:
    """Callers splat them into activation_record; each argument is named like its tensor, or shorter."""
    arguments = list(inspect.signature(activation_record).parameters)
    assert len(arguments) == len(INPUT_TENSORS)
    for argument, tensor in zip(arguments, INPUT_TENSORS, strict=True):
        assert argument == tensor or argument == tensor.split("_")[-1]


def test_massive_channels_stay_in_their_block() -> None:
    check_massive_channels("a", torch.tensor([[0, 3], [4, 7]], dtype=torch.int32), 8)
    check_massive_channels("a", torch.tensor([[0, 7]], dtype=torch.int32), 8)
    for channel in ([[0, 4], [4, 7]], [[0, 3], [3, 7]], [[0, 3], [4, 8]], [[-1, 3], [4, 7]]):
        with pytest.raises(MorphoQuantError, match=r"^a\.massive_channel: .* outside its block of 4 channels"):
            check_massive_channels("a", torch.tensor(channel, dtype=torch.int32), 8)


def test_check_order() -> None:
    check_order("a", torch.tensor([1, 0, 3, 2], dtype=torch.int32), blocks=2)
    check_order("a", torch.tensor([3, 0, 1, 2], dtype=torch.int32), blocks=1)
    for order, blocks in (([3, 0, 1, 2], 2), ([0, 1, 2, 2], 1), ([0, 1, 2, 4], 1), ([-1, 1, 2, 3], 1)):
        with pytest.raises(MorphoQuantError, match=r"^a\.channel_order"):
            check_order("a", torch.tensor(order, dtype=torch.int32), blocks)


def test_unequal_input_tensors_names_them() -> None:
    ours = {"gain": torch.ones(2), "centre": torch.zeros(2)}
    assert unequal_input_tensors(ours, {**ours, "centre": torch.ones(2)}, ("gain", "centre")) == ["centre"]
    assert unequal_input_tensors(ours, dict(ours), ("gain", "centre")) == []
