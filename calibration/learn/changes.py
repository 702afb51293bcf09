"""What learning changes in a checkpoint's tensors: steps, scales of outputs, and constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.learn.linear import LinearChanges
from morphoquant_vllm.format.layers import TWO_LEVEL_SCHEME, LayerSpec


@dataclass(frozen=True)
class Changes:
    """The learned tensors, float32; all are zero before the first update."""

    # Logarithm of the factor of each step of an input [K], by the input's name.
    steps: dict[str, Tensor]
    # Logarithm of the factor of each output's scale [N], by layer. bfloat16 scales of groups are too coarse to learn.
    scales: dict[str, Tensor]
    # Added to each output's constant [N], in units of `sizes`, by layer.
    constants: dict[str, Tensor]
    # Size of each layer's outputs in the 16-bit model, see targets.Pass16Bit.
    sizes: dict[str, float]

    def of(self, layer: str, settings: LayerSpec) -> LinearChanges:
        """The changes of one layer."""
        return LinearChanges(
            self.steps[settings.shared_input], self.scales.get(layer), self.constants[layer], self.sizes[layer]
        )

    def parameters(self) -> dict[str, Tensor]:
        """Everything that learns, by a name in files."""
        parts = {"step": self.steps, "scale": self.scales, "constant": self.constants}
        return {f"{kind} {name}": value for kind, part in parts.items() for name, value in part.items()}

    def applied(self, layer: str, settings: LayerSpec, tensor: str, value: Tensor) -> Tensor:
        """A stored tensor of a layer, with what was learned; layers that did not learn are unchanged."""
        if layer not in self.constants:
            return value
        if tensor == "activation_step":
            return value * self.steps[settings.shared_input].exp()
        if tensor == "weight_channel_scale":
            return value * self.scales[layer].exp()
        if tensor == "absorbed_bias":
            learned = value.clone()
            # Ranks add up their blocks [blocks, R, N]. The last row is that of massive tokens, whose constant is fixed.
            learned[0, :-1] += self.constants[layer] * self.sizes[layer]
            return learned
        return value


def no_changes(layers: Mapping[str, LayerSpec], sizes: Mapping[str, float], device: torch.device) -> Changes:
    """The changes of `layers` before the first step, as leaves that take gradients."""

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, device=device, requires_grad=True)

    return Changes(
        steps={settings.shared_input: zeros(settings.in_features) for settings in layers.values()},
        scales={
            name: zeros(settings.out_features)
            for name, settings in layers.items()
            if settings.scale_scheme == TWO_LEVEL_SCHEME
        },
        constants={name: zeros(settings.out_features) for name, settings in layers.items()},
        sizes=dict(sizes),
    )


def changes_of(tensors: Mapping[str, Tensor]) -> Changes:
    """The changes of the tensors that `parameters` and `size <layer>` name."""
    parts: dict[str, dict[str, Tensor]] = {"step": {}, "scale": {}, "constant": {}, "size": {}}
    for entry, value in tensors.items():
        kind, _, name = entry.partition(" ")
        parts[kind][name] = value
    sizes = {name: float(value) for name, value in parts["size"].items()}
    return Changes(parts["step"], parts["scale"], parts["constant"], sizes)
