"""Times of layers under a server's conditions: inside one CUDA graph, with weights outside the cache."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A server reads all other layers between two uses of one. Here this many times the cache is read in between.
COLD_CACHES = 4
REPLAYS = 20
# Calls whose host time is taken, and how many follow each other: the queue holds about a thousand launches.
HOST_CALLS, QUEUED_CALLS = 200, 20


def cold_copies(weight_bytes: int) -> int:
    """How many copies of a layer of `weight_bytes` to use in turn, such that each has left the cache by its turn."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-COLD_CACHES * cache // weight_bytes))


def graph_of(calls: Sequence[Callable[[Tensor], object]], x: Tensor) -> torch.cuda.CUDAGraph:
    """A CUDA graph that makes each of `calls` once, warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls[:1], *calls):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    return graph


def host_microseconds(calls: Sequence[Callable[[Tensor], object]], x: Tensor) -> float:
    """Median time that one of the `calls` takes the host, outside a CUDA graph, until it returns.

    Few calls follow each other: the GPU's queue starts empty and never fills, so no call waits for the GPU.
    """
    times = []
    for start in range(0, HOST_CALLS, QUEUED_CALLS):
        torch.cuda.synchronize()
        for index in range(start, start + QUEUED_CALLS):
            call = calls[index % len(calls)]
            before = time.perf_counter_ns()
            call(x)
            times.append(time.perf_counter_ns() - before)
    torch.cuda.synchronize()
    return statistics.median(times) / 1000


def microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Median time of one of the `calls` in a graph."""
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return 1000 * statistics.median(times) / calls
