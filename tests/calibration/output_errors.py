"""How far a quantized model's linears lie from the 16-bit model's, measured from outside."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from calibration.blocks.served_linear import TokenRows
from calibration.data.rendering import Sample


class OutputErrors:
    """Runs a model and its served double, and measures how far each quantized linear's output lies from its own."""

    def __init__(self, plain: nn.Module, served: nn.Module, layers: Mapping[str, str]) -> None:
        """`layers`: module names by the names in the report."""
        self._models = (plain, served)
        self._outputs: dict[str, list[list[Tensor]]] = {layer: [[], []] for layer in layers}
        for layer, module in layers.items():
            for model, outputs in zip(self._models, self._outputs[layer], strict=True):
                model.get_submodule(module).register_forward_hook(partial(self._add, outputs))

    @staticmethod
    def _add(outputs: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        bias = module.bias
        outputs.append((output if bias is None else output - bias).flatten(0, -2))

    @torch.no_grad()
    def run(self, samples: Iterable[Sample], serving: TokenRows) -> dict[str, float]:
        for sample in samples:
            serving.modality = sample.modality
            for model in self._models:
                model(**sample.inputs)
        found = {}
        for layer, outputs in self._outputs.items():
            plain, served = (torch.cat(parts) for parts in outputs)
            found[layer] = float((served - plain).norm() / plain.norm())
        return found
