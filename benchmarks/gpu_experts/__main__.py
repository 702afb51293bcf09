"""python -m benchmarks.gpu_experts: time one layer of routed experts on this machine's GPU, in CUDA graphs.

One layer of Qwen3-Omni-30B-A3B, with generated weights. A graph has calls of many routings, so their weights come from
memory. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.command import one_line_errors
from benchmarks.common.files import write_results
from benchmarks.common.machine import versions
from benchmarks.common.peers.vllm_layers import unless_refused, vllm_context, why_no_vllm
from benchmarks.common.tables.linears import table
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES

if TYPE_CHECKING:
    from benchmarks.gpu_experts.ways import Call
    from benchmarks.models.routed import Layer

PEERS = ("marlin-w4a16", "humming-w4a8")
METHODS = ("bf16", "morphoquant", "morphoquant-two-level", *PEERS)
TOKENS = (1, 4, 64, 512)
# Calls of a graph, each of another routing; rounds over all methods, so a clock that falls, falls for each of them.
ROUTINGS, ROUNDS = 16, 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_experts", description=__doc__)
    top.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    top.add_argument("--group-size", type=int, default=32, choices=GROUP_SIZES)
    top.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="numbers of tokens")
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu_experts"), help="results directory")
    return top


def measure(layer: Layer, methods: Sequence[str], group_size: int, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Times of every method by number of tokens, interleaved; a peer that cannot serve has vLLM's reason instead."""
    import torch

    from benchmarks.gpu_experts.ways import WAYS

    built: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name in methods:
        with unless_refused(name, PEERS, reasons):
            built[name] = WAYS[name](layer, group_size)
    rows = []
    for count in tokens:
        x = torch.randn(count, layer.hidden, device="cuda", dtype=torch.bfloat16)
        times = _times(built, x, layer, reasons)
        for name in methods:
            row = {"layer": "experts", "M": count, "method": name}
            if name in times:
                found = times[name]
                rows.append(row | {"us": statistics.median(found), "spread": max(found) / min(found)})
            else:
                rows.append(row | {"skipped": reasons[name]})
    return rows


def _times(built: dict[str, Call], x: Any, layer: Layer, reasons: dict[str, str]) -> dict[str, list[float]]:
    """Microseconds of a call in each round, by method; one that fails is taken out of `built`."""
    import torch

    from benchmarks.models.routed import routing
    from morphoquant_vllm.gpu.tools.timing import graph_of, microseconds

    generator = torch.Generator().manual_seed(x.shape[0])
    routings = [[part.cuda() for part in routing(x.shape[0], layer, generator)] for _ in range(ROUTINGS)]
    graphs = {}
    for name, call in list(built.items()):
        with unless_refused(name, PEERS, reasons):
            graphs[name] = graph_of([partial(_routed, call, *given) for given in routings], x)
        if name in reasons:
            del built[name]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph, ROUTINGS))
    return times


def _routed(call: Call, weights: Any, ids: Any, x: Any) -> object:
    return call(x, weights, ids)


def markdown(result: dict[str, Any]) -> str:
    """Device, versions and the table."""
    from benchmarks.models.routed import QWEN3_OMNI as layer

    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Routed experts on a GPU: {result['device']}, G = {result['group_size']}",
        "",
        f"`{result['command']}`; {found}. One layer of {layer.name}: {layer.experts} experts, {layer.chosen} of each "
        f"token, K = {layer.hidden}, I = {layer.between}. Median µs of rounds over all methods (times faster than "
        f"vLLM's bf16), in CUDA graphs of {ROUTINGS} routings. Quantization, sorting and the weighted sum are "
        "included.",
        "",
        *table(result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and keep the JSON and the table under the device's name."""
    arguments = parser().parse_args()
    import torch

    if not torch.cuda.is_available():
        raise MorphoQuantError("this machine has no GPU; run it on one")
    reason = why_no_vllm()
    if reason:
        raise MorphoQuantError(f"the peers are vLLM's, and {reason}; install vLLM's CUDA build")
    from benchmarks.models.routed import QWEN3_OMNI

    device = torch.cuda.get_device_name()
    with vllm_context():
        rows = measure(QWEN3_OMNI, arguments.methods, arguments.group_size, arguments.tokens)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu_experts", *sys.argv[1:]]),
        "device": device,
        "group_size": arguments.group_size,
        "versions": versions(),
        "rows": rows,
    }
    name = f"{device.replace(' ', '-')}-G{arguments.group_size}"
    for path in write_results(arguments.results, name, result, markdown(result)):
        print(path)


if __name__ == "__main__":
    with one_line_errors():
        main()
