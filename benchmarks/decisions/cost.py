"""Costs of channel order and massive check in the quantizer's torch reference; these are not figures of a kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.format.layers import MASSIVE_CHANNELS
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, activation_record, code_limits, token_rows

WARM_UP = 5


def make_record(in_features: int, seed: int, *, ordered: bool) -> ActivationRecord:
    """A record with 6 rows and one set of massive intervals; `ordered`: a random channel order, else the identity."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(in_features, generator=generator) if ordered else torch.arange(in_features)
    rows = len(DEFAULT_ROWS)
    return activation_record(
        step=torch.full((in_features,), 0.25),
        channel_order=order.int(),
        mask=torch.ones(rows, in_features, dtype=torch.bool),
        centre=torch.randn(in_features, generator=generator).expand(rows, -1),
        gain=torch.ones(rows),
        massive_channel=torch.randperm(in_features, generator=generator)[None, :MASSIVE_CHANNELS].int(),
        massive_low=torch.full((1, MASSIVE_CHANNELS), 50.0),
        massive_high=torch.full((1, MASSIVE_CHANNELS), 60.0),
    )


def without_gather(x: Tensor, rows: Tensor, record: ActivationRecord) -> Tensor:
    """`act_quant` without its gather of channels: equal to it if the order is the identity."""
    inverse, centre, mask = (field.index_select(0, rows) for field in record[:3])
    low, high = code_limits(mask)
    codes = torch.round((x.float() - centre) * inverse)
    codes = torch.where(codes.isnan(), 0.0, codes)
    return torch.minimum(torch.maximum(codes, low), high).to(torch.int8)


def measure_cost(tokens: int, in_features: int, runs: int, seed: int) -> dict[str, Any]:
    """Microseconds per call on bfloat16 x [tokens, in_features], the ways run in turn `runs` times."""
    ordered, natural = (make_record(in_features, seed, ordered=flag) for flag in (True, False))
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).bfloat16()
    text = torch.zeros(tokens, dtype=torch.int32)
    if not torch.equal(without_gather(x, text, natural), act_quant(x, text, natural)):
        raise AssertionError("without_gather no longer computes the codes of act_quant on an identity order")
    times = interleaved(
        {
            "act_quant": lambda: act_quant(x, text, ordered),
            "act_quant, no gather": lambda: without_gather(x, text, natural),
            "token_rows + act_quant": lambda: act_quant(x, token_rows(x, text, ordered), ordered),
            "token_rows alone": lambda: token_rows(x, text, ordered),
        },
        runs,
    )
    plain = times["act_quant"]
    gather = [a - b for a, b in zip(plain, times["act_quant, no gather"], strict=True)]
    check = [a - b for a, b in zip(times["token_rows + act_quant"], plain, strict=True)]
    return {
        "tokens": tokens,
        "in_features": in_features,
        "runs": runs,
        "microseconds": {name: spread(values) for name, values in times.items()},
        # Differences within a round, which saw the same load of the machine.
        "gather_microseconds": spread(gather),
        "massive_check_microseconds": spread(check),
    }


def interleaved(ways: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Microseconds of each way, one run of every way per round, beginning with another in each."""
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-WARM_UP, runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter_ns()
            ways[name]()
            elapsed = (time.perf_counter_ns() - started) / 1000
            if number >= 0:
                times[name].append(elapsed)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}
