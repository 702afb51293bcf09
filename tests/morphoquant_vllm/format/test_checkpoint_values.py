"""Values that break a rule of the format are refused in one line that names the tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.verify import verify_checkpoint
from tests.checkpoints import edit, write_config, write_random_checkpoint
from tests.morphoquant_vllm.refusal import refused

Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "tensor",
    ["weight_scale", "activation_step", "centre", "gain", "massive_low", "massive_high", "absorbed_bias", "bias"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite(checkpoint: Path, tensor: str, value: float) -> None:
    def damage(stored: Tensor) -> Tensor:
        stored.view(-1)[-1] = value
        return stored

    edit(checkpoint, f"{Q}.{tensor}", damage)
    refused(checkpoint, f"{Q}.{tensor}", "NaN")


@pytest.mark.parametrize("tensor", ["weight_scale", "activation_step", "gain"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_value_that_must_be_positive(checkpoint: Path, tensor: str, value: float) -> None:
    def damage(stored: Tensor) -> Tensor:
        stored.view(-1)[0] = value
        return stored

    edit(checkpoint, f"{Q}.{tensor}", damage)
    refused(checkpoint, f"{Q}.{tensor}", "positive")


@pytest.mark.parametrize("value", [1e-39, 1e-45])
def test_step_too_small_to_invert(checkpoint: Path, value: float) -> None:
    edit(checkpoint, f"{Q}.activation_step", lambda step: step.fill_(value))
    refused(checkpoint, f"{Q}.activation_step", "too small")


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("weight_scale", 3.3e38, "a scale is too large"),
        ("weight_scale", 1e15, "a scale is too large"),
        ("absorbed_bias", 3e38, "a value is too large"),
        ("absorbed_bias", -3e38, "a value is too large"),
        ("centre", 1e20, "a value is too large"),
        ("activation_step", 3e38, "step times gain is too large"),
        ("gain", 3e38, "step times gain is too large"),
        ("bias", 3e38, "a value is too large"),
    ],
)
def test_value_whose_products_leave_float32(checkpoint: Path, tensor: str, value: float, reason: str) -> None:
    edit(checkpoint, f"{Q}.{tensor}", lambda stored: stored.fill_(value))
    refused(checkpoint, f"{Q}.{tensor}" if tensor != "gain" else Q, reason)


def test_the_bound_of_outputs_knows_eight_bit_weights(tmp_path: Path) -> None:
    """Their codes reach 128, 16 times as far."""
    wide, scale = tmp_path / "wide", 2e13
    write_random_checkpoint(wide, eight_bit=["model.layers.0.self_attn.qkv_proj"])
    verify_checkpoint(wide)
    edit(wide, f"{DOWN}.weight_scale", lambda stored: stored.fill_(scale))
    verify_checkpoint(wide)
    edit(wide, f"{Q}.weight_scale", lambda stored: stored.fill_(scale))
    refused(wide, f"{Q}.weight_scale", "a scale is too large")


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_carried_tensor_with_a_value_that_is_not_finite(
    checkpoint: Path, value: float, found: str, dtype: torch.dtype
) -> None:
    def damage(stored: Tensor) -> Tensor:
        stored = stored.to(dtype)
        stored.view(-1)[-1] = value
        return stored

    edit(checkpoint, "model.embed_tokens.weight", damage)
    refused(checkpoint, "model.embed_tokens.weight", f"holds {found}")


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    ],
    ids=str,
)
def test_a_carried_tensor_of_any_type_may_not_hold_nan(checkpoint: Path, dtype: torch.dtype) -> None:
    norm = "model.norm.weight"
    edit(checkpoint, norm, lambda stored: stored.float().to(dtype))
    verify_checkpoint(checkpoint)
    edit(checkpoint, norm, lambda stored: torch.full(stored.shape, float("nan")).to(dtype))
    refused(checkpoint, norm, "NaN")


def test_a_carried_tensor_may_be_of_a_type_that_knows_no_nan(checkpoint: Path) -> None:
    edit(checkpoint, "model.norm.weight", lambda stored: stored.view(torch.float4_e2m1fn_x2))
    verify_checkpoint(checkpoint)


def test_a_carried_mask_may_hold_infinities(checkpoint: Path) -> None:
    edit(checkpoint, "model.norm.weight", lambda stored: stored.zero_().index_fill(0, torch.tensor([1]), -torch.inf))
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("row", [0, 3])
def test_mask_of_any_must_hold_every_modalitys(checkpoint: Path, row: int) -> None:
    def damage(mask: Tensor) -> Tensor:
        mask[row, 5], mask[4, 5] = True, False
        return mask

    edit(checkpoint, f"{DOWN}.modality_mask", damage)
    refused(checkpoint, f"{DOWN}.modality_mask", "'any'")


def test_the_massive_row_may_hold_more_than_any(checkpoint: Path) -> None:
    edit(checkpoint, f"{DOWN}.modality_mask", lambda mask: mask & (torch.arange(6) == 5)[:, None])
    edit(checkpoint, f"{DOWN}.modality_mask", lambda mask: mask.index_fill(0, torch.tensor([5]), True))
    assert len(verify_checkpoint(checkpoint).layers) == 14


def test_a_massive_channel_outside_its_block(checkpoint: Path) -> None:
    edit(checkpoint, f"{DOWN}.massive_channel", lambda channel: channel.flip(0))
    refused(checkpoint, f"{DOWN}.massive_channel", "outside its block of 64 channels")


def test_order_that_is_no_permutation(checkpoint: Path) -> None:
    def damage(order: Tensor) -> Tensor:
        order[0] = order[1]
        return order

    edit(checkpoint, f"{Q}.channel_order", damage)
    refused(checkpoint, f"{Q}.channel_order", "exactly once")


def test_order_that_leaves_its_tensor_parallel_block(checkpoint: Path) -> None:
    edit(checkpoint, f"{DOWN}.channel_order", lambda order: order.flip(0))
    refused(checkpoint, f"{DOWN}.channel_order", "within 2 tensor-parallel blocks")


def test_the_same_order_is_legal_where_nothing_is_cut(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tensor_parallel=1)
    edit(tmp_path, f"{DOWN}.channel_order", lambda order: order.flip(0))
    assert len(verify_checkpoint(tmp_path).layers) == 14


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("activation_step", lambda step: step * 2),
        ("channel_order", lambda order: order.flip(0)),
        ("modality_mask", lambda mask: mask | True),
        ("centre", lambda centre: centre + 1),
        ("gain", lambda gain: gain * 2),
        ("massive_channel", lambda channel: channel.flip(1)),
        ("massive_low", lambda low: low - 1),
        ("massive_high", lambda high: high + 1),
    ],
)
def test_unequal_fused_shards(checkpoint: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> None:
    edit(checkpoint, f"{K}.{tensor}", change)
    refused(checkpoint, f"{K}.{tensor}", Q, "self_attn.qkv_proj")


def test_nan_in_a_carried_over_tensor(checkpoint: Path) -> None:
    edit(checkpoint, "model.embed_tokens.weight", lambda weight: weight * torch.nan)
    refused(checkpoint, "model.embed_tokens.weight", "NaN")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fused layer with two-level scales, all others with group scales."""
    directory = tmp_path_factory.mktemp("mixed")
    write_random_checkpoint(directory, two_level=["model.layers.0.self_attn.qkv_proj"])
    return directory


def test_a_checkpoint_may_hold_both_scale_schemes(mixed: Path) -> None:
    assert len(verify_checkpoint(mixed).layers) == 14


@pytest.mark.parametrize(
    ("tensor", "value", "fragment"),
    [
        ("weight_level", 0, "every level must be 1 to 16"),
        ("weight_level", 17, "every level must be 1 to 16"),
        ("weight_level", 255, "every level must be 1 to 16"),
        ("weight_channel_scale", 0.0, "positive"),
        ("weight_channel_scale", -1.0, "positive"),
        ("weight_channel_scale", float("nan"), "NaN"),
        ("weight_channel_scale", float("inf"), "NaN"),
    ],
)
def test_two_level_scales_that_break_a_rule(
    mixed: Path, tmp_path: Path, tensor: str, value: float, fragment: str
) -> None:
    def damage(stored: Tensor) -> Tensor:
        stored.view(-1)[-1] = value
        return stored

    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    edit(copy, f"{K}.{tensor}", damage)
    refused(copy, f"{K}.{tensor}", fragment)


@pytest.mark.parametrize(
    ("tensor", "change", "fragment"),
    [
        ("weight_level", lambda level: level.to(torch.int32), "expected U8"),
        ("weight_channel_scale", lambda scale: scale[:, None], "expected F32 [32]"),
    ],
)
def test_two_level_scales_of_another_form(
    mixed: Path, tmp_path: Path, tensor: str, change: Callable[[Tensor], Tensor], fragment: str
) -> None:
    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    edit(copy, f"{K}.{tensor}", change)
    refused(copy, f"{K}.{tensor}", fragment)


def test_two_level_layer_with_group_scales(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)
    layers = spec.to_dict()["layers"]
    layers[DOWN]["scale_scheme"] = "two_level"
    write_config(checkpoint, spec, layers=layers)
    refused(checkpoint, f"{DOWN}.weight_level is missing")
