"""Computes the stated figures from the measurements: seconds, the bound, their ratio. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.calibrate.timing.bound import Decoder, block_work, cached_inputs, seconds
from benchmarks.calibrate.timing.measure import Measured

# Memory that the issue allows in addition to the cached inputs, for the 3B layout on a CPU.
MEMORY_LIMIT = 6 * 2**30


def summarise(
    measured: Measured,
    decoder: Decoder,
    published_blocks: int,
    samples: int,
    tokens: int,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON object of a result.

    Totals are of a model with `published_blocks` decoder blocks, whatever number was measured.
    """
    drawn = min(int(recipe["sample_tokens"]), samples * tokens)
    work = block_work(decoder, samples, tokens, drawn)
    typical = measured.typical_block()
    total, extrapolated = measured.total(published_blocks)
    bounds = {}
    for dtype in ("bfloat16", "float32"):
        least = seconds(work, measured.rates[dtype], measured.rates["float32"])
        bounds[dtype] = {
            "block": least,
            "total": least * published_blocks,
            "block_ratio": typical / least if typical is not None else None,
            "total_ratio": total / (least * published_blocks) if total is not None else None,
        }
    itemsize = 4 if recipe["dtype"] == "float32" else 2
    inputs = cached_inputs(decoder, samples, tokens, itemsize)
    anonymous = max((block["anonymous"] for block in measured.blocks.values()), default=0)
    return {
        "blocks": {str(number): block for number, block in sorted(measured.blocks.items())},
        "published_blocks": published_blocks,
        "finished": measured.finished,
        "block_seconds": typical,
        "setup_seconds": measured.setup(),
        "to_first_block_seconds": measured.to_first_block,
        "after_last_block_seconds": measured.after_last_block,
        "total_seconds": total,
        "extrapolated": extrapolated,
        "drawn_tokens": drawn,
        "work": asdict(work),
        "rates": measured.rates,
        "bounds": bounds,
        "peak": measured.peak,
        "gpu_peak": measured.gpu_peak,
        "anonymous_peak": anonymous,
        "cached_inputs": inputs,
        "memory_limit": MEMORY_LIMIT + inputs,
        "profile": measured.profile,
    }
