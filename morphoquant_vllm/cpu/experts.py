"""Routed experts on a CPU: checked calls of the compiled functions (cpu/kernels/experts.h).

M tokens, T experts of each token, E experts, K hidden channels, I intermediate channels, R modality rows. A pair is a
token and an expert that it chose. Native code sorts the pairs by expert. Two calls compute a layer, `gate_up` and
`down`, with torch's silu(gate) * up between them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from morphoquant_vllm.cpu import backend
from morphoquant_vllm.cpu.build import Kernels
from morphoquant_vllm.cpu.layout import HEADER_BYTES
from morphoquant_vllm.host_memory import zero_bytes
from morphoquant_vllm.numerics.experts import ExpertsRecord

# Pairs of a call at most: their codes and products take 0.2 GB with K = 2048 and I = 768. Tokens of a longer prompt
# follow in further calls, which read the weights again.
MOST_PAIRS = 16384
# The fields of ExpertsRequest in cpu/kernels/experts.h.
_REQUEST = struct.Struct("=24q")


class Projection(NamedTuple):
    """The weights of one linear of all experts, and the quantizers of its input, as `prepare` lays them out."""

    weight: Tensor  # uint8 [E, bytes]: a block of cpu.layout each
    absorbed_bias: Tensor  # float32 [E, R, N]
    activation: Tensor  # uint8 [1, bytes] for the one input of gate and up, [E, bytes] for down's
    channels: int  # K


@dataclass(frozen=True)
class Prepared:
    """The records of one layer for the kernels."""

    gate_up: Projection
    down: Projection

    @property
    def size(self) -> int:
        """The number of experts."""
        return self.down.weight.shape[0]


class Pairs(NamedTuple):
    """The tokens' experts, sorted by expert, then by token. `gate_up` fills it, `down` reads it. All int32."""

    place: Tensor  # [M, T]: the pair of each token and slot; -1 for an expert of another rank
    token: Tensor  # [M * T]: token of each pair
    start: Tensor  # [E + 1]: first pair of each expert, then the number of pairs


def prepare(record: ExpertsRecord) -> Prepared:
    """Lay out a layer's canonical records. Raises ValueError if they contradict each other.

    All experts of a linear lie in one block of memory, in large pages, since a single expert is smaller than a page.
    """
    count = record.size
    if not count:
        raise ValueError("the CPU kernels do not take these records: no experts")
    made: dict[str, Tensor] = {}
    for index in range(count):
        gate_up, down, intermediate = record.expert(index)
        (weight, _), (shared,) = backend.prepare(gate_up, record.input)
        (down_weight, _), (own,) = backend.prepare(down, intermediate)
        for name, block in (("gate_up", weight), ("down", down_weight), ("intermediate", own)):
            if not index:
                room = _room(record) if name == "intermediate" else block.numel()
                made[name] = zero_bytes(count * room).view(count, room)
            made[name][index, : block.numel()] = block
    hidden, between = record.input.channel_order.numel(), record.intermediate.channel_order.shape[1]
    if record.gate_up.codes.shape[1] != 2 * between:
        raise ValueError(f"the CPU kernels do not take these records: gate and up must have {2 * between} outputs")
    return Prepared(
        Projection(made["gate_up"], record.gate_up.absorbed_bias.contiguous(), shared[None], hidden),
        Projection(made["down"], record.down.absorbed_bias.contiguous(), made["intermediate"], between),
    )


def _room(record: ExpertsRecord) -> int:
    """Bytes of the longest activation block of down: one whose channels come in order has no channel_order."""
    sizes = [field[0].numel() * field.element_size() for field in record.intermediate]
    return HEADER_BYTES + sum(-(-size // 64) * 64 for size in sizes)


def run(
    x: Tensor,
    modality: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    prepared: Prepared,
    library: Kernels | None = None,
) -> Tensor:
    """y [M, K] in the dtype of x [M, K], as numerics.experts.experts; modality has M entries or more.

    Raises ValueError for records or inputs of another layout, IndexError for a modality that is not a row.
    """
    _check(x, modality, topk_weights, topk_ids)
    tokens, slots = topk_ids.shape
    y = x.new_empty((tokens, prepared.down.absorbed_bias.shape[2]))
    if not topk_ids.numel():
        return y.zero_()
    step = max(MOST_PAIRS // slots, 1)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        products, pairs = gate_up(x[part], modality[part], topk_ids[part], prepared, library)
        gate, up = products.chunk(2, dim=1)
        # In place: the same values, without memory for two more tensors.
        h = silu(gate, inplace=True).mul_(up)
        down(h, modality[part], topk_weights[part], topk_ids[part], pairs, prepared, y[part], library)
    return y


def gate_up(
    x: Tensor, modality: Tensor, topk_ids: Tensor, prepared: Prepared, library: Kernels | None = None
) -> tuple[Tensor, Pairs]:
    """gate and up of every pair, [pairs, 2I] in the dtype of x [M, K], and the pairs. Inputs are checked."""
    tokens, slots = topk_ids.shape
    place = torch.empty((tokens, slots), dtype=torch.int32)
    pairs = Pairs(place, torch.empty_like(place.view(-1)), torch.empty(prepared.size + 1, dtype=torch.int32))
    y = x.new_empty((tokens * slots, prepared.gate_up.absorbed_bias.shape[2]))
    _call(x, modality, topk_ids, 0, prepared.gate_up, pairs, y, library)
    return y[: int(pairs.start[-1])], pairs


def down(
    h: Tensor,
    modality: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    pairs: Pairs,
    prepared: Prepared,
    y: Tensor,
    library: Kernels | None = None,
) -> None:
    """Write y [M, K], the weighted sums of down of h [pairs, I]; `gate_up` made the pairs. Inputs are checked."""
    topk_weights = topk_weights.contiguous()
    _call(h, modality, topk_ids, topk_weights.data_ptr(), prepared.down, pairs, y, library)


def _call(
    x: Tensor,
    modality: Tensor,
    topk_ids: Tensor,
    slot_weights: int,
    projection: Projection,
    pairs: Pairs,
    y: Tensor,
    library: Kernels | None,
) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    modality, topk_ids = modality.contiguous(), topk_ids.contiguous()
    weight, absorbed_bias, activation, channels = projection
    count, rows, outputs = absorbed_bias.shape
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {list(x.shape)}")
    request = (
        *(x.data_ptr(), x.stride(0), backend.DTYPES[x.dtype], topk_ids.shape[0], channels, modality.data_ptr()),
        *(topk_ids.data_ptr(), int(topk_ids.dtype is torch.int64), topk_ids.shape[1], slot_weights, count),
        *(activation.data_ptr(), activation.stride(0) * (activation.shape[0] > 1), activation.shape[1]),
        *(weight.data_ptr(), weight.shape[1], absorbed_bias.data_ptr(), rows, outputs, torch.get_num_threads()),
        *(pairs.place.data_ptr(), pairs.token.data_ptr(), pairs.start.data_ptr(), y.data_ptr()),
    )
    status = (library or backend.loaded()).experts(_REQUEST.pack(*request))
    if status:
        raise backend.error(status)


def _check(x: Tensor, modality: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in backend.DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16 [M, K], got {x.dtype} {list(x.shape)}")
    tokens = x.shape[0]
    if modality.dtype is not torch.int32 or modality.dim() != 1 or modality.numel() < tokens:
        raise ValueError(f"modality must be int32 with {tokens} entries, got {modality.dtype} {list(modality.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64) or topk_ids.dim() != 2 or topk_ids.shape[0] != tokens:
        raise ValueError(f"topk_ids must be integers [{tokens}, T], got {topk_ids.dtype} {list(topk_ids.shape)}")
    if topk_weights.dtype is not torch.float32 or topk_weights.shape != topk_ids.shape:
        shape = list(topk_ids.shape)
        raise ValueError(f"topk_weights must be float32 {shape}, got {topk_weights.dtype} {list(topk_weights.shape)}")
    _on_cpu((x, modality, topk_weights, topk_ids))


def _on_cpu(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_cpu:
            raise ValueError(f"the CPU kernels must have all tensors on the CPU, got one on {tensor.device}")
