"""Loads the two models of a comparison, checkpoints and 16-bit models alike, and renders the data for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import morphoquant_vllm.hf  # noqa: F401 (registers the quantizer)
from calibration.data.data_files import load_conversations
from calibration.data.rendering import Sample, build_samples
from calibration.model.architectures import Architecture
from calibration.model.discovery import architecture_of_form
from calibration.model.loading import LOADING_ERRORS
from calibration.model.refusals import check_one_model
from calibration.model.run_config import prepare_run
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE
from morphoquant_vllm.format.files import read_json
from morphoquant_vllm.format.schema import DEFAULT_ROWS


@dataclass(frozen=True)
class Side:
    """One model of a comparison."""

    directory: Path
    architecture: Architecture
    config: dict[str, Any]

    @property
    def is_quantized(self) -> bool:
        """Whether it is a MorphoQuant checkpoint."""
        return "quantization_config" in self.config

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The whole model on the CPU; quantized linears compute on the kernels that serve them."""
        model_class = getattr(transformers, self.architecture.model_class)
        try:
            config = model_class.config_class.from_pretrained(
                str(self.directory), local_files_only=True, trust_remote_code=False
            )
            model, found = model_class.from_pretrained(
                str(self.directory),
                config=prepare_run(config),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except LOADING_ERRORS as error:
            words = " ".join(str(error).split())[:300]
            raise MorphoQuantError(f"{self.directory}: transformers cannot load it ({words}); see its files") from error
        # transformers would draw these at random.
        lost = {str(name) for name in found["missing_keys"]} | {str(name) for name, *_ in found["mismatched_keys"]}
        if lost:
            raise MorphoQuantError(
                f"{self.directory}: {min(lost)} is missing in the weight files, or has another shape than config.json "
                "says; copy the model again"
            )
        whole: nn.Module = model.eval()
        return whole


def open_side(directory: Path) -> Side:
    """A model directory by its config. Raises MorphoQuantError if it is missing, and as `architecture_of_form`."""
    config = read_json(directory / CONFIG_FILE)
    check_one_model(directory, config)
    return Side(directory, architecture_of_form(config, directory), config)


def check_pair(first: Side, second: Side) -> None:
    """Raise MorphoQuantError unless both sides are forms of one model."""
    if first.architecture != second.architecture:
        raise MorphoQuantError(
            f"{second.directory}: is a {second.architecture.model_type}, and {first.directory} is a "
            f"{first.architecture.model_type}; compare two forms of one model"
        )
    sizes = [
        {key: side.architecture.decoder_config(side.config).get(key) for key in ("num_hidden_layers", "vocab_size")}
        for side in (first, second)
    ]
    if sizes[0] != sizes[1]:
        raise MorphoQuantError(
            f"{second.directory}: its decoder has {sizes[1]}, the other's {sizes[0]}; compare two forms of one model"
        )


def read_samples(
    side: Side, data: Iterable[Path], max_tokens: int, max_samples: int | None, *, skip_bad: bool = False
) -> list[Sample]:
    """The data as inputs of the model, rendered by the processor of `side`."""
    return build_samples(
        side.directory,
        load_conversations(data, skip_bad=skip_bad),
        max_tokens=max_tokens,
        max_samples=max_samples,
        placeholder_token_ids=side.architecture.placeholder_token_ids(side.config),
        rows=DEFAULT_ROWS,
        skip_bad=skip_bad,
    )
