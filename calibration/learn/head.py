"""The source model after its decoder blocks: the final norm, and the head's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibration.model.architectures import Architecture
from calibration.model.head_tensor import HEAD, stored_head
from calibration.model.loading import empty_model, load_front
from calibration.model.plan import DecoderNames
from calibration.model.refusals import WRITES_TEXT
from calibration.model.source import Source
from calibration.settings.recipe import Recipe


def has_head(architecture: Architecture, source: Source, recipe: Recipe) -> bool:
    """Whether the model writes text, by a head of the usual name."""
    return architecture.model_class.endswith(WRITES_TEXT) and hasattr(empty_model(architecture, source, recipe), HEAD)


class Head:
    """Turns the last states of the decoder into the states before the head, which has `weight` [vocabulary, hidden]."""

    def __init__(
        self, architecture: Architecture, names: DecoderNames, source: Source, recipe: Recipe, device: torch.device
    ) -> None:
        self._model = load_front(architecture, source, recipe, stream_towers=True, device=device)
        self._model.requires_grad_(False)
        self._tuples, self._device = architecture.tuple_output, device
        self._blocks = list(self._model.get_submodule(architecture.block_module).children())
        stored = stored_head(architecture, names, source.tensors)
        weight = source.load(stored).to(device) if stored else self._model.get_input_embeddings().weight
        self._seen = _Seen()
        self._model.lm_head = self._seen
        # [vocabulary, hidden], times the factor that some models give the logits. A cap on logits is left out.
        self.weight: Tensor = weight.detach().float() * self._logit_factor(
            architecture.decoder_config(source.config)["hidden_size"]
        )

    def normed(self, last: Tensor) -> Tensor:
        """The states before the head float32 [M, hidden], of the last states [M, hidden]; gradients pass."""
        ids = torch.zeros(1, len(last), dtype=torch.long, device=self.weight.device)
        with _returning(self._blocks, last[None].to(self.weight.device, self._model.dtype), tuples=self._tuples):
            self._model(input_ids=ids, use_cache=False)
        seen: Tensor = self._seen.states[0].float()
        self._seen.states = torch.empty(0)
        return seen

    @torch.no_grad()
    def _logit_factor(self, hidden_size: int) -> float:
        # Not the model's: that of a streamed tower.
        device = self._device
        last = torch.linspace(-0.1, 0.1, hidden_size, device=device, dtype=self._model.dtype)
        with _returning(self._blocks, last[None, None], tuples=self._tuples):
            logits = self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        given, states = logits.logits.float(), self._seen.states.float()
        # A channel of the final norm may have the weight 0.
        factors = (given / states)[states != 0]
        return float(factors.median()) if factors.numel() else 1.0


class _Seen(nn.Module):
    """Stands for the head, and keeps what the model gives it."""

    states = torch.empty(0)

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return states


@contextmanager
def _returning(blocks: Sequence[nn.Module], states: Tensor, *, tuples: bool) -> Iterator[None]:
    """Make each block return `states`."""

    def forward(*given: Any, **arguments: Any) -> Any:
        return (states,) if tuples else states

    for block in blocks:
        # An attribute of the instance hides the class's method.
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
