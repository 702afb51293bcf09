"""Layers of a 7B model without a device, G = 32: bound, and launched by Triton's JIT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from benchmarks.models.shapes import GPU_LAYERS
from morphoquant_vllm import backends, handles, ops
from morphoquant_vllm.gpu import bound, device, layout, tiles
from morphoquant_vllm.gpu.tools.no_device import no_device, noted
from morphoquant_vllm.numerics.activation import ActivationRecord
from morphoquant_vllm.numerics.linear import WeightRecord

ROWS, GROUP = 6, 32
# Multiprocessors of an H100; they decide how often K is split.
UNITS = 132
WAYS = ("jit", "bound")
# Entries of the modality bus.
BUFFER = 8192


@dataclass(frozen=True)
class Layer:
    """A bound layer."""

    name: str
    two_level: bool
    in_features: int
    handle: Tensor
    weight: list[Tensor]
    activation: list[Tensor]

    def call(self, way: str, tokens: int) -> Callable[[], Tensor]:
        """A call by one of WAYS."""
        x = torch.zeros(tokens, self.in_features, dtype=torch.bfloat16)
        modality = torch.zeros(BUFFER, dtype=torch.int32)
        if way == "bound":
            return lambda: ops.bound_linear(x, modality, self.handle, None)
        return lambda: ops.linear(x, modality, self.weight, self.activation, None, "triton")

    def launches(self, call: Callable[[], Tensor]) -> int:
        """Launches of a call."""
        with noted() as found:
            call()
        return len(found)


def records(out_features: int, in_features: int, two_level: bool) -> tuple[WeightRecord, ActivationRecord]:
    """Records of zeros, since no kernel reads them. In down, with more inputs than outputs, channels come in order."""
    groups = (out_features, in_features // GROUP)
    weight = WeightRecord(
        torch.zeros((out_features, in_features // 2), dtype=torch.uint8),
        torch.ones(groups, dtype=torch.uint8) if two_level else torch.ones(groups, dtype=torch.bfloat16),
        torch.ones(out_features) if two_level else torch.zeros(0),
        torch.zeros(ROWS, out_features),
    )
    order = torch.arange(in_features).int()
    activation = ActivationRecord(
        inverse=torch.ones(ROWS, in_features),
        centre=torch.zeros(ROWS, in_features),
        mask=torch.ones(ROWS, in_features, dtype=torch.bool),
        gain=torch.ones(ROWS),
        channel_order=order if in_features > out_features else order.flip(0),
        massive_channel=torch.arange(4).int()[None],
        massive_low=torch.full((1, 4), 1e3),
        massive_high=torch.full((1, 4), 2e3),
    )
    return weight, activation


@contextmanager
def built(names: list[str]) -> Iterator[list[Layer]]:
    """The layers with group scales and with two-level ones, without a device."""
    profile = device.Profile(tiles.architectures()["sm_90"], UNITS, inline_assembly=True, pdl=True)
    layers = []
    with torch.inference_mode(), no_device(90), mock.patch.object(device, "profile_of", lambda _: profile):
        for name in names:
            out_features, in_features = GPU_LAYERS[name]
            for two_level in (False, True):
                weight, activation = backends.BACKENDS["triton"].prepare(*records(out_features, in_features, two_level))
                handle = weight[-1]
                prepared = layout.GpuWeight(*weight), layout.GpuActivation(*activation)
                # The self-check of ops.bind would compute on a GPU.
                handles.keep(handle, bound.bind(*prepared, None, torch.bfloat16, profile))
                layers.append(Layer(name, two_level, in_features, handle, weight, activation))
        yield layers
