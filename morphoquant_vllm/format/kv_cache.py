"""The entry of one decoder block in quantization_config.kv_cache: how large its queries, keys and values become."""

from __future__ import annotations

import sys
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
            # An integer of JSON may be too large for a float, of which isfinite makes one.
            known = type(magnitude) in (int, float) and 0 <= magnitude <= sys.float_info.max
            if not known:
                raise MorphoQuantError(
                    f"{name}: kv_cache has {magnitude!r} for its largest {part}, which must be a number of 0 or more; "
                    "copy config.json again"
                )
