"""The entry of one decoder block in quantization_config.kv_cache: how large its queries, keys and values become."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import MAX_MAGNITUDE


@dataclass(frozen=True)
class AttentionRange:
    """Largest magnitudes over the calibration tokens; of keys after rotary, as a cache stores them."""

    query: float
    key: float
    value: float

    def check(self, name: str) -> None:
        """Raise MorphoQuantError naming the block unless each is 0 to MAX_MAGNITUDE."""
        for part, magnitude in asdict(self).items():
            known = type(magnitude) in (int, float) and 0 <= magnitude <= MAX_MAGNITUDE
            if not known:
                raise MorphoQuantError(
                    f"{name}: kv_cache has {magnitude!r} for its largest {part}, which must be a number of 0 to "
                    f"{MAX_MAGNITUDE:g}; "
                    "copy config.json again"
                )
