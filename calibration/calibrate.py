"""`calibrate`: from a model directory and example data to a MorphoQuant checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.architectures import Architecture, find_architecture
from calibration.blocks import BlockResult, calibrate_blocks
from calibration.data import load_conversations
from calibration.export import checkpoint_size, write_checkpoint
from calibration.model import capture_block_inputs, choose_device, load_model
from calibration.plan import decoder_names, plan
from calibration.recipe import Recipe
from calibration.report import PACKAGE, make_report, package_version
from calibration.samples import Sample, build_samples
from calibration.sampling import choose_tokens
from calibration.source import Source, open_source
from calibration.staging import check_free_space, clear_write_errors, staged_directory
from calibration.towers import calibrate_towers, check_media
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.schema import QuantizationSpec


def calibrate(
    model: Path | str,
    data: Path | str | Iterable[Path | str],
    output: Path | str,
    *,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    on_block: Callable[[BlockResult], None] | None = None,
) -> dict[str, Any]:
    """Make a MorphoQuant checkpoint of the model directory `model` in the directory `output`.

    `data` names .jsonl files of conversations in OpenAI chat format, .txt files, or directories of .txt files.
    `on_block` is called after each decoder block. Returns the report that is also written to
    morphoquant_calibration.json. Raises MorphoQuantError for whatever the user can mend; then, as after any other
    failure, `output` is as it was before.
    """
    recipe = recipe or Recipe()
    choose_device(recipe.device)
    source = open_source(model)
    architecture = find_architecture(source.config)
    spec = plan(architecture, source.config, source.tensors, recipe, created_by=f"{PACKAGE} {package_version()}")
    conversations = load_conversations(data)
    with staged_directory(Path(output), source.directory, overwrite=overwrite) as directory:
        check_free_space(directory, checkpoint_size(source, spec))
        samples = build_samples(
            source.directory,
            conversations,
            max_tokens=recipe.max_tokens,
            max_samples=recipe.max_samples,
            window_tokens=recipe.window_tokens,
            placeholder_token_ids=spec.placeholder_token_ids,
            rows=spec.rows,
        )
        check_media(samples, recipe)
        try:
            quantized, report, distributions = _quantize(source, architecture, spec, samples, recipe, on_block)
        except torch.OutOfMemoryError as error:
            raise MorphoQuantError(
                f"{source.directory}: the GPU has too little free memory for it with dtype {recipe.dtype}; "
                "pass --dtype bfloat16 or --device cpu, or use fewer or shorter samples"
            ) from error
        with clear_write_errors(Path(output), source.directory):
            write_checkpoint(directory, source, spec, quantized, recipe.shard_size, report, distributions)
    return report


def _quantize(
    source: Source,
    architecture: Architecture,
    spec: QuantizationSpec,
    samples: Sequence[Sample],
    recipe: Recipe,
    on_block: Callable[[BlockResult], None] | None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Every layer's tensors, the report, and what is kept of every input's distribution."""
    tokens = choose_tokens(
        [sample.modality for sample in samples], recipe.sample_tokens, recipe.modality_balance, recipe.seed
    )
    model = load_model(architecture, source, recipe)
    blocks = list(model.get_submodule(architecture.block_module).children())
    inputs = capture_block_inputs(model, blocks, samples, tokens.positions)
    towers = calibrate_towers(model, samples, architecture=architecture, source=source, spec=spec, recipe=recipe)
    if towers:
        # The served stream begins with what the quantized towers give; what is aimed at is the 16-bit ones' still.
        for entry, again in zip(inputs, capture_block_inputs(model, blocks, samples, tokens.positions), strict=True):
            entry.served = again.hidden
    # From here on only the blocks are needed, and each only until it is done.
    del model
    quantized = {name: layer.tensors for result in towers for name, layer in result.layers.items()}
    records = {name: layer.record for result in towers for name, layer in result.layers.items()}
    distributions = {name: found for result in towers for name, found in result.distributions.items()}
    for result in calibrate_blocks(
        blocks,
        inputs,
        tokens,
        architecture=architecture,
        names=decoder_names(architecture, source.config, source.tensors),
        source=source,
        spec=spec,
        recipe=recipe,
    ):
        quantized |= {name: layer.tensors for name, layer in result.layers.items()}
        records |= {name: layer.record for name, layer in result.layers.items()}
        distributions |= result.distributions
        if on_block is not None:
            on_block(result)
    inputs.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report = make_report(recipe, spec, records, len(samples), tokens.counts)
    return quantized, report, distributions
