"""The entry of one decoder block in quantization_config.kv_cache: how large its queries, keys and values become."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from morphoquant_vllm.errors import MorphoQuantError


@dataclass(frozen=True)
class AttentionRange:
    """Largest magnitudes over the calibration tokens; of keys after rotary, as a cache stores them."""

    query: float
    key: float
    value: float

    def check(self, name: str) -> None:
        """Raise MorphoQuantError naming the block unless all are finite and none is negative."""
        for part, magnitude in asdict(self).items():
            if type(magnitude) not in (int, float) or not math.isfinite(magnitude) or magnitude < 0:
                raise MorphoQuantError(
                    f"{name}: kv_cache has {magnitude!r} for its largest {part}, which must be a number of 0 or more; "
                    "copy config.json again"
                )
