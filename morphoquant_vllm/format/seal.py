"""Seals a checkpoint: after all other files, config.json is written with their lists and hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from morphoquant_vllm.format.beside import digests_beside
from morphoquant_vllm.format.checkpoint import owner_of, read_headers
from morphoquant_vllm.format.integrity import Integrity, config_digests, file_digest
from morphoquant_vllm.format.schema import QuantizationSpec


def sealed(directory: Path, config: Mapping[str, Any], spec: QuantizationSpec) -> QuantizationSpec:
    """`spec` with the lists and digests of the files in `directory` and of `config`, the model's config.json.

    Reads every weight file once. The tokenizer's and the processor's files have to be there already. Raises
    MorphoQuantError if index and files do not agree.
    """
    stored = read_headers(directory)
    files = sorted({tensor.file for tensor in stored.values()})
    return replace(
        spec,
        integrity=Integrity(
            files={name: file_digest(directory / name) for name in files},
            carried=tuple(sorted(name for name in stored if owner_of(name, spec.linears) is None)),
            config=config_digests(config),
            settings=spec.settings_digest(),
            beside=digests_beside(directory),
        ),
    )
