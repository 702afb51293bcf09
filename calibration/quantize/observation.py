"""Observation of a decoder block's inputs by module hooks: statistics by row, and the drawn tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibration.data.token_choice import DrawnTokens
from calibration.processes import ONE, Processes
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.statistics import REDUCTIONS, ChannelStatistics


@dataclass(frozen=True)
class Observation:
    """One linear input as calibration saw it."""

    # By row (a modality's, or the massive one), over all processes; rows without tokens are absent.
    statistics: dict[int, ChannelStatistics]
    # Activations of the drawn tokens, float32 [local drawn, K], in the order of DrawnTokens.
    drawn: Tensor


class InputReached(Exception):
    """Ends a block's run at the requested input."""


class DrawnCollector:
    """Keeps the drawn tokens of one linear input, on the device on which the model runs.

    `without_samples`, [0, K] on that device, is the result of a process that has no calibration samples.
    """

    def __init__(self, name: str, without_samples: Tensor | None = None) -> None:
        self.name = name
        self._chosen: list[Tensor] = [] if without_samples is None else [without_samples]

    def add(self, x: Tensor, rows: Tensor, positions: Tensor, *others: Tensor) -> None:
        """Add one calibration sample: x [M, K], the rows of its tokens int [M] and its drawn positions int64.

        `others` are the module's further inputs.
        """
        self._chosen.append(x[positions].float())

    def drawn(self) -> Tensor:
        """The drawn tokens so far, float32 [drawn, K], in the order of DrawnTokens."""
        if len(self._chosen) > 1:
            first = self._chosen[0]
            whole = first.new_empty(sum(part.shape[0] for part in self._chosen), first.shape[1])
            end = whole.shape[0]
            # From the last to the first: each part is freed after its copy, so the tokens are never in memory twice.
            while self._chosen:
                part = self._chosen.pop()
                whole[end - part.shape[0] : end] = part
                end -= part.shape[0]
            self._chosen = [whole]
        return self._chosen[0]


class InputCollector(DrawnCollector):
    """A DrawnCollector that also gathers statistics."""

    def __init__(self, name: str, without_samples: Tensor | None = None) -> None:
        super().__init__(name, without_samples)
        self._statistics: dict[int, ChannelStatistics] = {}

    def add(self, x: Tensor, rows: Tensor, positions: Tensor, *others: Tensor) -> None:
        """As DrawnCollector.add. Raises MorphoQuantError with the layer's name if x holds NaN or infinite values."""
        present = rows.unique().tolist()
        for row in present:
            new = ChannelStatistics.of(x if len(present) == 1 else x[rows == row])
            if not bool(torch.isfinite(new.abs_sum).all()):
                raise MorphoQuantError(
                    f"{self.name}: its input holds NaN or infinite values in calibration; check the model's weights, "
                    "or run it with dtype float32"
                )
            old = self._statistics.get(row)
            self._statistics[row] = new if old is None else old.merge(new)
        super().add(x, rows, positions)

    def observation(self, processes: Processes = ONE) -> Observation:
        """Everything gathered so far; the statistics are those of all processes together."""
        drawn = self.drawn()
        found = {}
        for row in sorted(set().union(*processes.all_gather(set(self._statistics)))):
            local = self._statistics.get(row) or _no_tokens(drawn)
            found[row] = ChannelStatistics(
                **{
                    field.name: processes.all_reduce(getattr(local, field.name), REDUCTIONS[field.name])
                    for field in fields(local)
                }
            )
        return Observation(found, drawn)


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of all processes chose."""

    # Experts of each drawn token, bool [drawn, E], on the CPU, in the order of DrawnTokens.
    chosen: Tensor
    # Tokens of all calibration samples by modality and expert, int64 [R, E], on the CPU.
    counts: Tensor


class RoutedCollector(InputCollector):
    """An InputCollector of a module of routed experts, which also notes the experts of each token.

    `modality_of` gives the modalities of the running sample's tokens, int [M]; `rows` tells massive ones apart.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        modality_of: Callable[[], Tensor],
        without_samples: Tensor | None = None,
    ) -> None:
        """`shape`: the numbers of rows and of experts."""
        super().__init__(name, without_samples)
        self._modality_of = modality_of
        self._counts = torch.zeros(shape, dtype=torch.int64)
        self._experts: list[Tensor] = [torch.zeros(0, shape[1], dtype=torch.bool)]

    def add(self, x: Tensor, rows: Tensor, positions: Tensor, *others: Tensor) -> None:
        """As InputCollector.add; the first of `others` holds the ids of each token's experts, int64 [M, slots]."""
        super().add(x, rows, positions)
        ids = others[0].cpu().long()
        chosen = torch.zeros(ids.shape[0], self._counts.shape[1], dtype=torch.bool).scatter_(1, ids, value=True)
        self._experts.append(chosen[positions.cpu()])
        self._counts.index_add_(0, self._modality_of().flatten().cpu().long(), chosen.long())

    def routing(self, tokens: DrawnTokens) -> Routing:
        """The routing so far, of all processes."""
        return Routing(tokens.all_gather(torch.cat(self._experts)), tokens.processes.all_reduce(self._counts, "SUM"))


def _no_tokens(like: Tensor) -> ChannelStatistics:
    """Statistics of no tokens of an input [tokens, K], on the devices of the real ones."""
    empty = ChannelStatistics.empty(like.shape[1])
    places = {field.name: like.device for field in fields(empty)} | {"count": empty.count.device}
    return ChannelStatistics(**{name: getattr(empty, name).to(place) for name, place in places.items()})


def run_observed(
    block: nn.Module,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    collectors: Mapping[str, DrawnCollector],
    rows: Tensor,
    positions: Tensor,
    *,
    stop: bool = False,
) -> Tensor | None:
    """Run a decoder block on one calibration sample [1, M, hidden]; `collectors`, by linear name, get its inputs.

    With `stop` the run ends, without output, at the first observed input.
    """

    def observe(collector: DrawnCollector, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        if x.shape[0] != rows.numel():
            raise MorphoQuantError(
                f"{collector.name}: its input has {x.shape[0]} tokens of a calibration sample of {rows.numel()}; "
                "this model cannot be calibrated"
            )
        collector.add(x, rows, positions, *inputs[1:])
        if stop:
            raise InputReached

    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(observe, collector))
        for name, collector in collectors.items()
    ]
    try:
        output = block(hidden, **arguments)
    except InputReached:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return output if isinstance(output, Tensor) else output[0]
