"""One comparison, from two directories and data to its figures."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from calibration.compare.measure import compare
from calibration.compare.models import check_pair, open_side, read_samples
from calibration.compare.show import comparison_data
from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compare_models(
    first: Path,
    second: Path,
    data: Iterable[Path],
    *,
    max_samples: int | None = None,
    max_tokens: int = 2048,
    dtype: str = "float32",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """The figures of two forms of one model on the same data.

    `first` is the measure: usually the 16-bit source, `second` its checkpoint. Raises MorphoQuantError if a directory
    cannot be read, if they are not forms of one model, or for data that cannot be used. With `skip_bad` conversations
    that cannot be used are left out.
    """
    if dtype not in DTYPES:
        raise MorphoQuantError(f"--dtype '{dtype}' is unknown; known: {', '.join(DTYPES)}")
    sides = open_side(first), open_side(second)
    check_pair(*sides)
    samples = read_samples(sides[0], data, max_tokens, max_samples, skip_bad=skip_bad)
    reference, judged = (side.load(DTYPES[dtype]) for side in sides)

    def tell(done: int) -> None:
        logger.info("sample %d of %d", done, len(samples))

    comparison = compare(reference, judged, sides[0].architecture.block_module, samples, tell)
    return comparison_data(first, second, comparison)
