"""Tensors that config.json makes one, as a head tied to the embedding, against those of the files."""

from __future__ import annotations

from collections.abc import Mapping

from calibration.model.source import Source
from morphoquant_vllm.errors import MorphoQuantError


def check_ties(source: Source, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse files that hold both tensors of a tie with other values, or only the second: vLLM reads the first alone.

    transformers takes both kinds of files. `wanted` are the ties by config.json, `found` those of the model that it has
    loaded: the second tensor's name, and the first's.
    """
    for second, first in wanted.items():
        if second not in found:
            raise MorphoQuantError(
                f"{source.directory}: {second} differs from {first}, and config.json ties the two, so vLLM would serve "
                f"{first} for both; set tie_word_embeddings to false in config.json, or remove {second} from the files"
            )
        # Names in the files may begin otherwise.
        ending = ".".join(first.rsplit(".", 2)[-2:])
        if not any(name.endswith(ending) for name in source.tensors):
            raise MorphoQuantError(
                f"{source.directory}: the files hold {second} alone, but vLLM reads {first}, to which config.json ties "
                "it; load the model in transformers, and save it with save_pretrained"
            )
