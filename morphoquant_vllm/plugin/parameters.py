"""Parameters that cut one checkpoint tensor for fused layers and tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import MASSIVE_CHANNELS, TWO_LEVEL_SCHEME, LayerSpec, check_tensor_parallel
from morphoquant_vllm.format.schema import QuantizationSpec


class SharedInputParameter(BasevLLMParameter):
    """A tensor of the layer's input: shards of a fused layer must bring the same values; row-parallel ranks cut K.

    vLLM's RowvLLMParameter would silently keep the values of the last shard. `cut` is the dimension over K or over
    blocks of K; None if the tensor has none, as gain. `shards` is the number of shards that bring it.
    """

    def __init__(
        self, *, data: Tensor, weight_loader: Callable[..., None], name: str, cut: int | None, shards: int
    ) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.name_in_messages = name
        self.cut = cut
        self.filled = False
        # vLLM counts loaded elements to find out when a layer is complete that is loaded again.
        self.weight_loader_numel = shards * data.numel()

    def _fill(self, loaded_weight: Tensor, **_: Any) -> None:
        if loaded_weight.shape != self.data.shape:
            raise MorphoQuantError(
                f"{self.name_in_messages}: has shape {list(loaded_weight.shape)}, expected {list(self.data.shape)}"
            )
        if self.is_meta:
            # vLLM counts what a loader would copy, before it loads a layer again.
            self.data.copy_(loaded_weight)
            return
        if self.filled and not torch.equal(self.data, loaded_weight.to(self.data.device)):
            raise MorphoQuantError(
                f"{self.name_in_messages}: differs between the shards of a fused layer; calibrate again"
            )
        self.data.copy_(loaded_weight)
        self.filled = True

    load_column_parallel_weight = _fill
    load_merged_column_weight = _fill
    load_qkv_weight = _fill

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        if self.cut is not None:
            loaded_weight = _rank_slice(loaded_weight, self.cut, self.data.shape[self.cut], self.tp_rank)
        self._fill(loaded_weight)


class AbsorbedBiasParameter(ChannelQuantScaleParameter):
    """absorbed_bias [B, R, N]: fused shards and column-parallel ranks cut N, row-parallel ranks the blocks of K."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        super().load_row_parallel_weight(_rank_slice(loaded_weight, 0, self.data.shape[0], self.tp_rank))


def _rank_slice(loaded_weight: Tensor, dimension: int, size: int, rank: int) -> Tensor:
    return loaded_weight.narrow(dimension, rank * size, size)


class LoadLog:
    """The loaded shards of each tensor: vLLM does not report the missing tensors of a quantized model."""

    def __init__(self) -> None:
        self._loaded: dict[str, set[Any]] = {}

    def watch(self, tensor: str, loader: Callable[..., None], fused: bool) -> Callable[..., None]:
        """`loader` that also notes the shard it loaded; `fused` if vLLM's layer joins several linears."""

        def load(param: BasevLLMParameter, loaded_weight: Tensor, *shard: Any, **named_shard: Any) -> None:
            shard_id = tuple(value for value in (*shard, *named_shard.values()) if value is not None)
            several = not shard_id or isinstance(shard_id[0], tuple)
            if fused and several and isinstance(param, SharedInputParameter):
                # Several shards in one of the file's tensors: attn.qkv of Qwen2.5-VL, or Qwen3.5's in_proj_qkv, whose
                # shard id is a tuple. vLLM would cut the tensor along an output dimension.
                param.load_column_parallel_weight(loaded_weight)
            else:
                loader(param, loaded_weight, *shard, **named_shard)
            self._loaded.setdefault(tensor, set()).add(shard_id)

        return load

    def check(self, name: str, tensor: str, shards: int) -> None:
        """Raise MorphoQuantError unless `shards` shards of the tensor were loaded. They may be loaded again."""
        loaded = len(self._loaded.pop(tensor, ()))
        if loaded != shards:
            raise MorphoQuantError(
                f"{name}.{tensor}: {loaded} of {shards} shards were loaded; the checkpoint is incomplete"
            )


def check_ranks(spec: QuantizationSpec, name: str, layer: LayerSpec, ranks: int) -> None:
    """Refuse to cut K of the row-parallel `layer` among `ranks` for which the checkpoint was not made."""
    if ranks == 1:
        return
    check_tensor_parallel(name, layer.in_features, layer.group_size, ranks)
    if spec.tensor_parallel % ranks:
        allowed = [size for size in range(1, spec.tensor_parallel + 1) if spec.tensor_parallel % size == 0]
        raise MorphoQuantError(
            f"{name}: tensor parallel size {ranks} breaks a group: the checkpoint was made for sizes {allowed}; serve "
            f"with one of these, or calibrate with --tensor-parallel {ranks}"
        )


def make_parameters(
    name: str,
    in_features: int,
    out_features: int,
    layer: LayerSpec,
    rows: int,
    blocks: int,
    shards: int,
    watch: Callable[[str], Callable[..., None]],
) -> dict[str, BasevLLMParameter]:
    """One rank's parameters of one (fused) layer under the format's tensor names; `watch` gives each its loader.

    `in_features` and `out_features` are the rank's, `layer` holds settings that all shards share.
    `blocks` is the number of this rank's blocks of K, of those that the checkpoint stores; `shards` that of the
    checkpoint's layers in it.
    """

    def shared(tensor: str, shape: tuple[int, ...], dtype: torch.dtype, cut: int | None) -> SharedInputParameter:
        data = torch.zeros(shape, dtype=dtype)
        loader = watch(tensor)
        return SharedInputParameter(data=data, weight_loader=loader, name=f"{name}.{tensor}", cut=cut, shards=shards)

    return {
        **_weight_parameters(in_features, out_features, layer, watch),
        "absorbed_bias": AbsorbedBiasParameter(
            data=torch.zeros(blocks, rows, out_features, dtype=torch.float32),
            output_dim=2,
            weight_loader=watch("absorbed_bias"),
        ),
        "activation_step": shared("activation_step", (in_features,), torch.float32, cut=0),
        "channel_order": shared("channel_order", (in_features,), torch.int32, cut=0),
        "modality_mask": shared("modality_mask", (rows, in_features), torch.bool, cut=1),
        "centre": shared("centre", (rows, in_features), torch.float32, cut=1),
        "gain": shared("gain", (rows,), torch.float32, cut=None),
        "massive_channel": shared("massive_channel", (blocks, MASSIVE_CHANNELS), torch.int32, cut=0),
        "massive_low": shared("massive_low", (blocks, MASSIVE_CHANNELS), torch.float32, cut=0),
        "massive_high": shared("massive_high", (blocks, MASSIVE_CHANNELS), torch.float32, cut=0),
    }


def _weight_parameters(
    in_features: int, out_features: int, layer: LayerSpec, watch: Callable[[str], Callable[..., None]]
) -> dict[str, BasevLLMParameter]:
    """The codes and scales of the weights; the arguments are those of make_parameters."""

    def by_group(tensor: str, dtype: torch.dtype) -> GroupQuantScaleParameter:
        data = torch.zeros(out_features, in_features // layer.group_size, dtype=dtype)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=watch(tensor))

    scales: dict[str, BasevLLMParameter] = {}
    if layer.scale_scheme == TWO_LEVEL_SCHEME:
        scales["weight_level"] = by_group("weight_level", torch.uint8)
        scales["weight_channel_scale"] = ChannelQuantScaleParameter(
            data=torch.zeros(out_features, dtype=torch.float32),
            output_dim=0,
            weight_loader=watch("weight_channel_scale"),
        )
    else:
        scales["weight_scale"] = by_group("weight_scale", torch.bfloat16)
    of_a_byte = 8 // layer.weight_bits
    dtype = torch.uint8 if of_a_byte > 1 else torch.int8
    return {
        "weight_codes": PackedvLLMParameter(
            data=torch.zeros(out_features, in_features // of_a_byte, dtype=dtype),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=of_a_byte,
            weight_loader=watch("weight_codes"),
        ),
        **scales,
    }
