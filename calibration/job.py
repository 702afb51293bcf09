"""The constants of a calibration, and its limits of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from calibration.blocks.memory_need import MemoryNeed, check_memory, memory_need
from calibration.data.token_choice import DrawnTokens, share_tokens
from calibration.model.architectures import Architecture
from calibration.model.plan import DecoderNames
from calibration.model.source import Source
from calibration.processes import Processes
from calibration.quantize.grids import SEARCH_TOKENS
from calibration.quantize.held_out import HOLDING_EFFORTS, tokens_of_held_samples
from calibration.settings.recipe import Recipe, rounds_jointly
from morphoquant_vllm.format.schema import QuantizationSpec

# No calibration with fewer drawn tokens is suggested.
LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Job:
    """The constants of a calibration."""

    source: Source
    architecture: Architecture
    names: DecoderNames
    spec: QuantizationSpec
    recipe: Recipe
    # In bytes, for all processes on this machine together, and for each GPU; None: the free memory.
    memory_budget: int | None
    device: torch.device
    processes: Processes
    # Whether steps and scales will learn after the blocks. False until precision.spend_budgets has decided it.
    learns: bool = False
    # Escape budgets of inputs that have another one than the recipe's, by the input's name.
    escape_budgets: Mapping[str, float] = field(default_factory=dict)
    # The files of the metrics of outputs, by name, as in work.budgets.Choice.
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def memory_need(self, tokens: DrawnTokens | None = None) -> MemoryNeed:
        """The memory peaks of one process of this calibration; MorphoQuantError if they exceed a stated budget."""
        drawn = 0
        if tokens is not None:
            owners = tokens.token_owners
            drawn = int(owners.bincount().max())
            if self.processes.size > 1:
                # The search also gathers tokens of other processes.
                drawn = min(owners.numel(), drawn + 2 * SEARCH_TOKENS)
        learns = self.may_learn(tokens)
        need = self._need(drawn, learns=learns)
        # A GPU's memory cannot be exceeded, a machine's is only slow then.
        if self.memory_budget is not None or self.device.type == "cuda":
            limit = self.device_limit
            stated = self.device.type == "cpu" or limit == self.memory_budget
            fitting = None if tokens is None or need.block <= limit else self._fitting_tokens(tokens, drawn, limit)
            check_memory(need, limit, self.source.directory, stated=stated, fitting_tokens=fitting)
        return need

    def _need(self, drawn: int, *, learns: bool) -> MemoryNeed:
        need = memory_need(
            *(self.architecture, self.source.tensors, self.names, self.spec, self.recipe, drawn),
            joint=rounds_jointly(self.recipe, learns=learns),
        )
        # A tower's quantized layers stay in memory and compute the next layers' inputs.
        return replace(need, front_streamed=need.front) if self.recipe.towers else need

    def _fitting_tokens(self, tokens: DrawnTokens, local: int, limit: int) -> int | None:
        """The largest half, quarter... of the drawn tokens with which a block takes at most `limit` bytes, or None.

        `local` is the number of those that one process has.
        """
        drawn, halvings = tokens.modality.numel(), 1
        while drawn >> halvings >= LEAST_TOKENS:
            # The first token of every sample is drawn beside as many as are asked for.
            if self._need((local >> halvings) + len(tokens.positions), learns=self.may_learn(tokens)).block <= limit:
                return drawn >> halvings
            halvings += 1
        return None

    def may_learn(self, tokens: DrawnTokens | None) -> bool:
        """Whether steps and scales may learn: by the effort, experts and samples; not before the samples are known."""
        effort = self.recipe.effort
        if effort not in HOLDING_EFFORTS or self.has_experts or tokens is None:
            return False
        return tokens_of_held_samples(tokens, effort) is not None

    @property
    def has_experts(self) -> bool:
        """Whether the decoder has quantized experts: beside them nothing learns."""
        return any(name.startswith(f"{self.names.prefix}.") for name in self.spec.experts)

    @property
    def memory_limit(self) -> int:
        """Bytes that this process may use."""
        together = psutil.virtual_memory().available if self.memory_budget is None else self.memory_budget
        return together // self.processes.local_size

    @property
    def device_limit(self) -> int:
        """Bytes that this process may use where the model runs: of its GPU, or of this machine."""
        if self.device.type != "cuda":
            return self.memory_limit
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return free if self.memory_budget is None else min(free, self.memory_budget)

    def choose_tokens(self, modalities: Mapping[int, Tensor]) -> DrawnTokens:
        """Choose the tokens for the search. `modalities` holds the rows of this process's samples, by sample index."""
        recipe = self.recipe
        return share_tokens(self.processes, modalities, recipe.sample_tokens, recipe.modality_balance, recipe.seed)
