"""The loop over the decoder: each block is observed on every sample, quantized, and its outputs feed the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from calibration.blocks.capture import ADDED, SERVED_ADDED, BlockInput
from calibration.blocks.served_experts import ServedExperts
from calibration.blocks.served_linear import ServedLinear, TokenRows
from calibration.data.token_choice import TokenSample
from calibration.model.architectures import Architecture
from calibration.model.experts import PROJECTIONS, find_experts, load_expert
from calibration.model.loading import Blocks
from calibration.model.plan import DecoderNames
from calibration.model.source import Source
from calibration.output.distributions import observe
from calibration.processes import Processes
from calibration.quantize.attention_range import AttentionWatch
from calibration.quantize.experts import ExpertsSample, QuantizedExperts, quantize_experts
from calibration.quantize.layer import InputSample, QuantizedLayer, quantize_input
from calibration.quantize.layer_report import escape_warning
from calibration.quantize.massive_tokens import candidates
from calibration.quantize.observation import InputCollector, RoutedCollector, SampleCollector, run_observed
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.layers import experts_input, input_holder
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.host_memory import release_freed_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockResult:
    """One finished block; `loss` is the mean output error of its layers (None if no layer is quantized)."""

    index: int
    count: int
    layers: dict[str, QuantizedLayer]
    loss: float | None
    # The kept tensors of each input's distribution, by the input's name.
    distributions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # By the name of the list of experts.
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)
    # None if no attention was seen.
    attention: AttentionRange | None = None


@dataclass(frozen=True)
class LayerBegins:
    """The input of a block that is quantized next, by the name of its fused layer."""

    index: int
    count: int
    layer: str


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

    def given(self, entry: BlockInput, hidden: Tensor, *, served: bool = False) -> Tensor:
        """What the model gives the block of the hidden states before it: some add features of media to them."""
        passed = entry.arguments[self.index]
        added = passed.get(SERVED_ADDED if served and SERVED_ADDED in passed else ADDED)
        return hidden if added is None else hidden + added.to(hidden.device)

    def modality(self) -> Tensor:
        """The modality of each token of the running sample."""
        assert self.serving.modality is not None
        return self.serving.modality

    def run(
        self,
        entry: BlockInput,
        hidden: Tensor,
        collectors: Mapping[str, SampleCollector],
        rows: Tensor,
        *,
        served: bool = False,
        stop: bool = False,
    ) -> Tensor:
        """The output for one sample of a stream, on the CPU; the input if the run stops early."""
        self.serving.modality = entry.modality
        output = run_observed(
            self.module,
            self.given(entry, hidden, served=served).to(self.device),
            {name: value for name, value in entry.arguments[self.index].items() if name not in (ADDED, SERVED_ADDED)},
            collectors,
            rows.to(self.device),
            entry.positions.to(self.device),
            stop=stop,
        )
        return hidden if output is None else output.cpu()


@torch.no_grad()
def calibrate_blocks(
    blocks: Blocks,
    inputs: Sequence[BlockInput],
    tokens: TokenSample,
    *,
    architecture: Architecture,
    names: DecoderNames,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
    escape_budgets: Mapping[str, float] | None = None,
    first: int = 0,
    on_layer: Callable[[LayerBegins], None] | None = None,
) -> Iterator[BlockResult]:
    """Yield the quantized layers of each block in order, from block `first` on.

    Two streams of hidden states go through the decoder. The 16-bit model's stream gives the target outputs of layers.
    The served stream runs the layers quantized so far, also within the block. `inputs` hold the states before block
    `first`; at each result they hold the inputs of the next block. One block at a time is in memory. `inputs` are this
    process's samples, and `tokens` describes those of all processes. Every process yields the same. `on_layer` is
    called before each input of a block is quantized. `escape_budgets` are those of inputs that have another one than
    the recipe's.
    """
    recipe_of = partial(_recipe_of, recipe, escape_budgets or {})
    serving = TokenRows(spec.any_row)
    sampled = {spec.rows[row]: int((tokens.modality == row).sum()) for row in tokens.counts}
    for index in range(first, len(blocks)):
        shards_of = {
            shared.shards: [names.layer(index, shard) for shard in shared.shards]
            for shared in architecture.shared_inputs
            if names.layer(index, shared.shards[0]) in spec.layers
        }
        module = blocks.load(index)
        block = _LoadedBlock(module, index, len(blocks), inputs, serving, next(module.parameters()).device)
        del module
        routed = names.layer(index, architecture.experts)
        experts = {architecture.experts: routed} if routed in spec.experts else {}
        found = _calibrate_block(block, shards_of, experts, tokens, source, spec, recipe_of, on_layer)
        del block
        records = {spec.layers[name].shared_input: layer.record for name, layer in found.layers.items()}
        records |= {experts_input(name): layer.record.input for name, layer in found.experts.items()}
        for shared_input, record in records.items() if tokens.processes.first else ():
            warning = escape_warning(shared_input, record, recipe_of(shared_input), sampled)
            if warning:
                logger.warning("%s", warning)
        errors = [layer.record.output_error for layer in found.layers.values()]
        errors += [error for layer in found.experts.values() for error in layer.record.errors]
        loss = sum(errors) / len(errors) if errors else None
        yield BlockResult(index, len(blocks), found.layers, loss, found.distributions, found.experts, found.attention)


def _recipe_of(recipe: Recipe, escape_budgets: Mapping[str, float], shared_input: str) -> Recipe:
    """The recipe of an input, which may have an escape budget of its own."""
    budget = escape_budgets.get(shared_input)
    return recipe if budget is None else recipe.model_copy(update={"escape_budget": budget})


@dataclass
class _Quantized:
    """What a block's calibration has made so far; the fields of BlockResult."""

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    distributions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)
    attention: AttentionRange | None = None


def _calibrate_block(
    block: _LoadedBlock,
    shards_of: Mapping[tuple[str, ...], list[str]],
    experts: Mapping[str, str],
    tokens: TokenSample,
    source: Source,
    spec: QuantizationSpec,
    recipe_of: Callable[[str], Recipe],
    on_layer: Callable[[LayerBegins], None] | None,
) -> _Quantized:
    """The block's layers and the distributions of its inputs; its samples then hold the inputs of the next block.

    `shards_of` maps each input's linears, by their names in the block, to layers. `experts` maps the list of experts of
    the block to its name in the files; experts come after all linears.
    """
    # Shards read the same input, so only the first is observed.
    # Used only if this process has no samples: samples determine the width themselves.
    widths = {shards[0]: (layers[0], spec.layers[layers[0]].in_features) for shards, layers in shards_of.items()}
    widths |= {module: (name, spec.experts[name].in_features) for module, name in experts.items()}
    none = {
        module: None if block.inputs else torch.zeros(0, width, device=block.device)
        for module, (_, width) in widths.items()
    }
    targets = {module: SampleCollector(name, none[module]) for module, (name, _) in widths.items()}
    massive_row = len(spec.rows) - 1
    rows, attention = _run_16bit(block, targets, massive_row, tokens.processes)
    of_sampled = (row[entry.positions] for row, entry in zip(rows, block.inputs, strict=True))
    outlying = torch.cat([torch.zeros(0, dtype=torch.bool), *(row == massive_row for row in of_sampled)])
    found = _Quantized(attention=attention)
    for shards, layers in shards_of.items():
        if on_layer is not None:
            on_layer(LayerBegins(block.index, block.count, spec.layers[layers[0]].shared_input))
        collectors = targets.pop(shards[0]), InputCollector(layers[0], none[shards[0]])
        sample = _sample_input(block, shards[0], *collectors, rows, outlying, tokens.processes)
        weights = {layer: _load_weight(source, layer) for layer in layers}
        # Forward passes and collectors freed 2 GB at K = 11008, and the next step needs the most memory.
        release_freed_memory()
        shared_input = spec.layers[layers[0]].shared_input
        quantized = quantize_input(sample, tokens, weights, spec, recipe_of(shared_input))
        for shard, layer in zip(shards, layers, strict=True):
            _replace(block.module, shard, quantized[layer], block.serving)
        found.layers |= quantized
        found.distributions[shared_input] = observe(sample, tokens, quantized[layers[0]].tensors, spec)
        # Sampled tokens are the largest thing in memory, and the next pass gathers as many.
        del collectors, sample, weights
    for module, name in experts.items():
        if on_layer is not None:
            on_layer(LayerBegins(block.index, block.count, name))
        shape = len(spec.rows), spec.experts[name].count
        served = RoutedCollector(name, shape, block.modality, none[module])
        sample = _sample_input(block, module, targets.pop(module), served, rows, outlying, tokens.processes)
        routed = ExpertsSample(sample, served.routing(tokens))
        _quantize_experts(block, module, name, routed, tokens, source, spec, recipe_of(name), found)
        del served, sample, routed
    for entry, row in zip(block.inputs, rows, strict=True):
        entry.write_served(block.run(entry, entry.served, {}, row, served=True))
    return found


def _quantize_experts(
    block: _LoadedBlock,
    module: str,
    name: str,
    sample: ExpertsSample,
    tokens: TokenSample,
    source: Source,
    spec: QuantizationSpec,
    recipe: Recipe,
    found: _Quantized,
) -> None:
    """Quantize the list of experts `name`, replace it in the block, and add it to `found`."""
    stored = find_experts(name, source.tensors)
    assert stored is not None

    def load(expert: int) -> dict[str, Tensor]:
        weights = load_expert(source, stored, expert, PROJECTIONS)
        for kind, weight in weights.items():
            _check_finite(stored.projection(expert, kind), weight)
        return weights

    release_freed_memory()
    quantized = quantize_experts(sample, tokens, name, load, spec, recipe)
    parent, _, last = module.rpartition(".")
    dtype = getattr(torch, recipe.dtype)
    served = ServedExperts(name, stored.count, quantized.tensors, block.serving, block.device, dtype)
    setattr(block.module.get_submodule(parent), last, served)
    found.experts[name] = quantized
    shared_input = experts_input(name)
    found.distributions[shared_input] = observe(sample.input, tokens, quantized.tensors[input_holder(name)], spec)


def _run_16bit(
    block: _LoadedBlock, targets: Mapping[str, SampleCollector], massive_row: int, processes: Processes
) -> tuple[list[Tensor], AttentionRange | None]:
    """Carry the 16-bit hidden states through the block.

    Returns each sample's rows int [tokens]: `massive_row` for tokens whose residual stream is an outlier before or
    after the block, else the token's modality. Then the range of the block's attention.
    """
    norms, watch = [torch.zeros(0)], AttentionWatch()
    for entry in block.inputs:
        before = block.given(entry, entry.hidden)
        with watch:
            after = block.run(entry, entry.hidden, targets, entry.modality)
        entry.write_hidden(after)
        norms.append(torch.maximum(*(state.float().norm(dim=-1).flatten() for state in (before, after))))
    modality = torch.cat([torch.zeros(0, dtype=torch.int32), *(entry.modality.flatten() for entry in block.inputs)])
    rows = torch.where(candidates(torch.cat(norms), modality, processes), massive_row, modality)
    return list(rows.split([entry.modality.numel() for entry in block.inputs])), watch.range(processes)


def _sample_input(
    block: _LoadedBlock,
    linear: str,
    target: SampleCollector,
    served: InputCollector,
    rows: Sequence[Tensor],
    outlying: Tensor,
    processes: Processes,
) -> InputSample:
    """The input of `linear` after the layers quantized so far; `target` holds its input in the 16-bit model."""
    aimed = target.sample()
    for entry, row in zip(block.inputs, rows, strict=True):
        block.run(entry, entry.served, {linear: served}, row, served=True, stop=True)
    return InputSample(served.observation(processes), aimed, outlying)


def _replace(block: nn.Module, shard: str, layer: QuantizedLayer, serving: TokenRows) -> None:
    parent, _, name = shard.rpartition(".")
    old = block.get_submodule(shard)
    weight = next(old.parameters())
    bias = old.bias if isinstance(old.bias, Tensor) else None
    setattr(block.get_submodule(parent), name, ServedLinear(layer.tensors, bias, serving, weight.device, weight.dtype))


def _load_weight(source: Source, layer: str) -> Tensor:
    weight = source.load(f"{layer}.weight")
    _check_finite(layer, weight)
    return weight


def _check_finite(layer: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise MorphoQuantError(f"{layer}.weight: holds NaN or infinite values; the source model is damaged")
