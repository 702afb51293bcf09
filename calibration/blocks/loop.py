"""The loop over the decoder: each block is observed on every sample, quantized, and its outputs feed the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calibration.blocks.capture import BlockInput
from calibration.blocks.replacing import expert_loader, load_weight, replace, replace_linear
from calibration.blocks.results import BlockResult, LayerBegins, Quantized, warn_of_escapes
from calibration.blocks.sample_pass import block_arguments, given_states
from calibration.blocks.served_experts import ServedExperts
from calibration.blocks.served_linear import TokenRows
from calibration.data.token_choice import DrawnTokens
from calibration.model.architectures import Architecture
from calibration.model.block_loader import Blocks
from calibration.model.experts import find_experts
from calibration.model.plan import DecoderNames
from calibration.model.source import Source
from calibration.output.distributions import observe
from calibration.processes import Processes
from calibration.quantize.attention_range import AttentionWatch
from calibration.quantize.experts import DrawnExperts, quantize_experts
from calibration.quantize.layer import DrawnInput, quantize_input
from calibration.quantize.massive_tokens import outlying_tokens
from calibration.quantize.observation import DrawnCollector, InputCollector, RoutedCollector, run_observed
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.layers import experts_input, input_holder
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.host_memory import release_freed_memory


@dataclass(frozen=True)
class _LoadedBlock:
    """A block in memory, and the samples of this process that run through it."""

    module: nn.Module
    index: int
    count: int
    inputs: Sequence[BlockInput]
    # Rows of the running sample's tokens, for the linears that are already quantized.
    serving: TokenRows
    # Noted when it is loaded: a block may have no parameters but those of its linears, which are replaced.
    device: torch.device
    # The metrics of outputs by layer; layers without one are absent.
    metrics: Mapping[str, Tensor]

    def modality(self) -> Tensor:
        """The modality of each token of the running sample."""
        assert self.serving.modality is not None
        return self.serving.modality

    def run(
        self,
        entry: BlockInput,
        hidden: Tensor,
        collectors: Mapping[str, DrawnCollector],
        rows: Tensor,
        *,
        served: bool = False,
        stop: bool = False,
    ) -> Tensor:
        """The output for one sample of a stream, on the CPU; the input if the run stops early."""
        self.serving.modality = entry.modality
        output = run_observed(
            self.module,
            given_states(entry, self.index, hidden, served=served).to(self.device),
            block_arguments(entry, self.index),
            collectors,
            rows.to(self.device),
            entry.positions.to(self.device),
            stop=stop,
        )
        return hidden if output is None else output.cpu()


@dataclass(frozen=True)
class _Observed:
    """What the 16-bit pass through a block left."""

    # The 16-bit values of each observed input, by the module; `_drawn_input` takes them out.
    sixteen_bit: dict[str, DrawnCollector]
    # By the module: the input [0, K] of a process without samples; None if it has some.
    without_samples: Mapping[str, Tensor | None]
    # Each sample's rows, int [tokens].
    rows: Sequence[Tensor]
    # Drawn tokens with an outlying residual stream, bool [local drawn].
    outlying: Tensor
    # None if no attention was seen.
    attention: AttentionRange | None


@torch.no_grad()
def calibrate_blocks(
    blocks: Blocks,
    inputs: Sequence[BlockInput],
    tokens: DrawnTokens,
    *,
    architecture: Architecture,
    names: DecoderNames,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
    escape_budgets: Mapping[str, float] | None = None,
    first: int = 0,
    on_layer: Callable[[LayerBegins], None] | None = None,
    metrics_of: Callable[[int], Mapping[str, Tensor]] = lambda _: {},
) -> Iterator[BlockResult]:
    """Yield the quantized layers of each block in order, from block `first` on.

    Two streams of hidden states go through the decoder. The 16-bit model's stream gives the target outputs of layers.
    The served stream runs the layers quantized so far, also within the block. `inputs` hold the states before block
    `first`; at each result they hold the inputs of the next block. One block at a time is in memory. `inputs` are this
    process's samples, and `tokens` describes those of all processes. Every process yields the same. `on_layer` is
    called before each input of a block is quantized. `escape_budgets` are those of inputs that have another one than
    the recipe's. `metrics_of` gives the metrics of outputs of a block's layers.
    """
    task = _Task(tokens, source, spec, partial(_recipe_of, recipe, escape_budgets or {}), on_layer)
    serving = TokenRows(spec.any_row)
    for index in range(first, len(blocks)):
        shards_of = {
            shared.shards: [names.layer(index, shard) for shard in shared.shards]
            for shared in architecture.shared_inputs
            if names.layer(index, shared.shards[0]) in spec.layers
        }
        routed = names.layer(index, architecture.experts)
        experts = {architecture.experts: routed} if routed in spec.experts else {}
        block = _load_block(blocks, index, inputs, serving, metrics_of(index))
        found = _calibrate_block(block, shards_of, experts, task)
        del block
        if tokens.processes.first:
            warn_of_escapes(found, tokens, spec, task.recipe_of)
        yield found.result(index, len(blocks))


def _recipe_of(recipe: Recipe, escape_budgets: Mapping[str, float], shared_input: str) -> Recipe:
    """The recipe of an input, which may have an escape budget of its own."""
    budget = escape_budgets.get(shared_input)
    return recipe if budget is None else recipe.model_copy(update={"escape_budget": budget})


@dataclass(frozen=True)
class _Task:
    """What the calibration of every block takes."""

    tokens: DrawnTokens
    source: Source
    spec: QuantizationSpec
    # The recipe of an input, by its name.
    recipe_of: Callable[[str], Recipe]
    on_layer: Callable[[LayerBegins], None] | None

    def begin(self, block: _LoadedBlock, layer: str) -> None:
        """Announce that the input of `layer` is quantized next."""
        if self.on_layer is not None:
            self.on_layer(LayerBegins(block.index, block.count, layer))


def _calibrate_block(
    block: _LoadedBlock, shards_of: Mapping[tuple[str, ...], list[str]], experts: Mapping[str, str], task: _Task
) -> Quantized:
    """The block's layers and the distributions of its inputs; its samples then hold the inputs of the next block.

    `shards_of` maps each input's linears, by their names in the block, to layers. `experts` maps the list of experts of
    the block to its name in the files; experts come after all linears.
    """
    spec = task.spec
    # Shards read the same input, so only the first is observed.
    widths = {shards[0]: (layers[0], spec.layers[layers[0]].in_features) for shards, layers in shards_of.items()}
    widths |= {module: (name, spec.experts[name].in_features) for module, name in experts.items()}
    observed = _observe_16bit(block, widths, len(spec.rows) - 1, task.tokens.processes)
    found = Quantized(attention=observed.attention)
    for shards, layers in shards_of.items():
        _calibrate_linears(block, shards, layers, observed, task, found)
    for module, name in experts.items():
        _calibrate_experts(block, module, name, observed, task, found)
    for entry, row in zip(block.inputs, observed.rows, strict=True):
        entry.write_served(block.run(entry, entry.served, {}, row, served=True))
    return found


def _calibrate_linears(
    block: _LoadedBlock,
    shards: Sequence[str],
    layers: Sequence[str],
    observed: _Observed,
    task: _Task,
    found: Quantized,
) -> None:
    """Quantize the linears of one input, replace them in the block, and add them to `found`.

    The input's drawn tokens are the largest thing in memory, and the next pass gathers as many. So nothing here may
    outlive the call.
    """
    shared_input = task.spec.layers[layers[0]].shared_input
    task.begin(block, shared_input)
    served = InputCollector(layers[0], observed.without_samples[shards[0]])
    drawn = _drawn_input(block, shards[0], served, observed, task.tokens.processes)
    weights = {layer: load_weight(task.source, layer) for layer in layers}
    # Forward passes and collectors freed 2 GB at K = 11008, and the next step needs the most memory.
    release_freed_memory()
    recipe = task.recipe_of(shared_input)
    quantized = quantize_input(drawn, task.tokens, weights, task.spec, recipe, metrics=block.metrics)
    for shard, layer in zip(shards, layers, strict=True):
        replace_linear(block.module, shard, quantized[layer], block.serving)
    found.layers |= quantized
    found.distributions[shared_input] = observe(drawn, task.tokens, quantized[layers[0]].tensors, task.spec)


def _calibrate_experts(
    block: _LoadedBlock, module: str, name: str, observed: _Observed, task: _Task, found: Quantized
) -> None:
    """As _calibrate_linears, for the list of experts `name`."""
    task.begin(block, name)
    stored = find_experts(name, task.source.tensors)
    assert stored is not None
    shape = len(task.spec.rows), task.spec.experts[name].count
    collector = RoutedCollector(name, shape, block.modality, observed.without_samples[module])
    drawn = _drawn_input(block, module, collector, observed, task.tokens.processes)
    routed = DrawnExperts(drawn, collector.routing(task.tokens))
    release_freed_memory()
    recipe = task.recipe_of(name)
    load = expert_loader(task.source, stored)
    quantized = quantize_experts(routed, task.tokens, name, load, task.spec, recipe)
    dtype = getattr(torch, recipe.dtype)
    served = ServedExperts(name, stored.count, quantized.tensors, block.serving, block.device, dtype)
    replace(block.module, module, served)
    found.experts[name] = quantized
    tensors = quantized.tensors[input_holder(name)]
    found.distributions[experts_input(name)] = observe(drawn, task.tokens, tensors, task.spec)


def _load_block(
    blocks: Blocks, index: int, inputs: Sequence[BlockInput], serving: TokenRows, metrics: Mapping[str, Tensor]
) -> _LoadedBlock:
    """The block `index` with its weights; only the result refers to them."""
    module = blocks.load(index)
    return _LoadedBlock(module, index, len(blocks), inputs, serving, next(module.parameters()).device, metrics)


def _observe_16bit(
    block: _LoadedBlock, widths: Mapping[str, tuple[str, int]], massive_row: int, processes: Processes
) -> _Observed:
    """What the 16-bit hidden states show on their way through the block.

    `widths` are the name and K of each observed module. `massive_row` is the row of massive tokens.
    """
    # Only for a process without samples: samples determine the width themselves.
    without_samples = {
        module: None if block.inputs else torch.zeros(0, width, device=block.device)
        for module, (_, width) in widths.items()
    }
    sixteen_bit = {module: DrawnCollector(name, without_samples[module]) for module, (name, _) in widths.items()}
    rows, attention = _run_16bit(block, sixteen_bit, massive_row, processes)
    of_drawn = (row[entry.positions] for row, entry in zip(rows, block.inputs, strict=True))
    outlying = torch.cat([torch.zeros(0, dtype=torch.bool), *(row == massive_row for row in of_drawn)])
    return _Observed(sixteen_bit, without_samples, rows, outlying, attention)


def _run_16bit(
    block: _LoadedBlock, sixteen_bit: Mapping[str, DrawnCollector], massive_row: int, processes: Processes
) -> tuple[list[Tensor], AttentionRange | None]:
    """Carry the 16-bit hidden states through the block.

    Returns each sample's rows int [tokens]: `massive_row` for tokens whose residual stream is an outlier before or
    after the block, else the token's modality. Then the range of the block's attention.
    """
    norms, watch = [torch.zeros(0)], AttentionWatch()
    for entry in block.inputs:
        before = given_states(entry, block.index, entry.hidden)
        with watch:
            after = block.run(entry, entry.hidden, sixteen_bit, entry.modality)
        entry.write_hidden(after)
        norms.append(torch.maximum(*(state.float().norm(dim=-1).flatten() for state in (before, after))))
    modality = torch.cat([torch.zeros(0, dtype=torch.int32), *(entry.modality.flatten() for entry in block.inputs)])
    rows = torch.where(outlying_tokens(torch.cat(norms), modality, processes), massive_row, modality)
    return list(rows.split([entry.modality.numel() for entry in block.inputs])), watch.range(processes)


def _drawn_input(
    block: _LoadedBlock, module: str, served: InputCollector, observed: _Observed, processes: Processes
) -> DrawnInput:
    """The input of `module` after the layers quantized so far, in `served`, and in the 16-bit model."""
    x16 = observed.sixteen_bit.pop(module).drawn()
    for entry, row in zip(block.inputs, observed.rows, strict=True):
        block.run(entry, entry.served, {module: served}, row, served=True, stop=True)
    return DrawnInput(served.observation(processes), x16, observed.outlying)
