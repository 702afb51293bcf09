"""Measures this machine's rates of matrix products, in the dtypes of the bound."""

from __future__ import annotations

import time

import torch
from torch.nn import functional

# A sample through a quarter of the widest linear of the 3B layout: M x N x K.
SHAPE = (512, 2752, 2048)
REPEATS = 5
# Without units for a type a product takes long, and always as long.
BUDGET_SECONDS = 2.0
CPU = torch.device("cpu")


def product_rate(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = SHAPE,
    repeats: int = REPEATS,
    device: torch.device = CPU,
) -> float:
    """FLOP/s of the fastest of some products x @ weight.T, on a GPU or as many threads as torch has been given."""
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    weight = torch.randn(out_features, in_features, device=device).to(dtype)
    times: list[float] = []
    with torch.no_grad():
        functional.linear(x[:32], weight)
        _wait(device)
        while not times or (len(times) < repeats and sum(times) < BUDGET_SECONDS):
            started = time.perf_counter()
            functional.linear(x, weight)
            _wait(device)
            times.append(time.perf_counter() - started)
    return 2 * tokens * out_features * in_features / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
