"""The weights of a model's head among the tensors of its files."""

from __future__ import annotations

from collections.abc import Mapping

from calibration.model.architectures import Architecture
from calibration.model.plan import DecoderNames
from calibration.model.source import TensorInfo

HEAD = "lm_head"


def head_tensor(architecture: Architecture, names: DecoderNames, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """The head's weights [V, D]: those stored for it, or those of the embedding.

    The latter is the largest tensor outside blocks and towers. config.json need not name the size of the vocabulary.
    """
    stored = tensors.get(f"{architecture.model_prefix}{HEAD}.weight")
    if stored is not None:
        return stored
    others = (*architecture.tower_prefixes, f"{names.prefix}.")
    own = {name: info for name, info in tensors.items() if name.startswith(architecture.model_prefix)}
    outside = [info for name, info in own.items() if not name.startswith(others)]
    return max(outside, key=lambda info: info.elements)
