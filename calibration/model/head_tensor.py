"""The weights of a model's head among the tensors of its files."""

from __future__ import annotations

from collections.abc import Mapping

from calibration.model.architectures import Architecture
from calibration.model.plan import DecoderNames
from calibration.model.source import TensorInfo

HEAD = "lm_head"


def is_head(name: str) -> bool:
    """Whether a tensor in the files is the weights of a head."""
    return name == f"{HEAD}.weight" or name.endswith(f".{HEAD}.weight")


def stored_head(architecture: Architecture, names: DecoderNames, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Name of the head's own weights in the files; None if they hold none, so that the embedding's serve.

    Some models, as Qwen2-Audio, were published with the head beside their decoder, not at the model's start.
    """
    starts = (architecture.model_prefix, f"{names.prefix.removesuffix('.model.layers')}.")
    return next((name for start in starts if (name := f"{start}{HEAD}.weight") in tensors), None)


def head_tensor(architecture: Architecture, names: DecoderNames, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """The head's weights [vocabulary, hidden]: those stored for it, or those of the embedding.

    The latter is the largest tensor outside blocks and towers. config.json need not name the size of the vocabulary.
    """
    stored = stored_head(architecture, names, tensors)
    if stored is not None:
        return tensors[stored]
    others = (*architecture.tower_prefixes, f"{names.prefix}.")
    own = {name: info for name, info in tensors.items() if name.startswith(architecture.model_prefix)}
    outside = [info for name, info in own.items() if not name.startswith(others)]
    return max(outside, key=lambda info: info.elements)
