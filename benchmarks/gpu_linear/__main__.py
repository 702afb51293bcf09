"""python -m benchmarks.gpu_linear: time linear layers on this machine's GPU, in CUDA graphs. Needs a GPU."""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.common.command import one_line_errors
from benchmarks.common.files import write_results
from benchmarks.common.machine import versions
from benchmarks.common.peers.vllm_layers import unless_refused, vllm_context, why_no_vllm
from benchmarks.common.tables.linears import by_point, cells
from benchmarks.gpu_linear.report import markdown
from benchmarks.models.shapes import GPU_LAYERS, GPU_TOKENS
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.limits import GROUP_SIZES

OURS = ("morphoquant", "morphoquant-two-level")
PEERS = (
    *("marlin-w4a16", "marlin-w4a8", "machete-w4a16", "cutlass-w4a8-fp8", "cutlass-w8a8"),
    *("humming-w4a8", "humming-w4a8-channel", "humming-w4a4"),
)
METHODS = ("bf16", *OURS, *PEERS)
# Rounds over all methods, so a clock that falls under load falls for each of them.
ROUNDS = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_linear", description=__doc__)
    top.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    top.add_argument("--group-size", type=int, default=32, choices=GROUP_SIZES)
    top.add_argument("--tokens", type=int, nargs="+", default=list(GPU_TOKENS), help="numbers of tokens")
    top.add_argument("--layers", nargs="+", default=list(GPU_LAYERS), choices=list(GPU_LAYERS))
    top.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu_linear"), help="results directory")
    return top


def measure(layer: str, arguments: argparse.Namespace, refused: str) -> list[dict[str, Any]]:
    """Times of every method on one layer, interleaved; a method that cannot serve it has the reason instead.

    `refused` is the reason why no peer can run, empty if they can.
    """
    import torch

    from benchmarks.gpu_linear.layers import LAYERS
    from morphoquant_vllm.gpu.tools.timing import cold_copies, graph_of, host_microseconds, microseconds

    out_features, in_features = GPU_LAYERS[layer]
    # Enough copies for the smallest weights, those of 4 bits.
    copies = cold_copies(out_features * in_features // 2)
    built: dict[str, list[Any]] = {}
    reasons = {name: refused for name in PEERS if refused}
    for name in arguments.methods:
        if name in reasons:
            continue
        with unless_refused(name, PEERS, reasons):
            calls = [LAYERS[name](out_features, in_features, arguments.group_size) for _ in range(copies)]
            if isinstance(calls[0], str):
                reasons[name] = calls[0]
            else:
                built[name] = calls
    rows = []
    for tokens in arguments.tokens:
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        graphs = {}
        for name, calls in list(built.items()):
            with unless_refused(name, PEERS, reasons):
                graphs[name] = graph_of(calls, x)
            if name in reasons:
                del built[name]
        times: dict[str, list[float]] = {name: [] for name in built}
        host: dict[str, list[float]] = {name: [] for name in built}
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                times[name].append(microseconds(graph, copies))
                host[name].append(host_microseconds(built[name], x))
        for name in arguments.methods:
            row = {"layer": layer, "N": out_features, "K": in_features, "M": tokens, "method": name}
            if name in reasons:
                rows.append(row | {"skipped": reasons[name]})
            else:
                measured = {"us": statistics.median(times[name]), "spread": spread(times[name])}
                rows.append(row | measured | {"host_us": statistics.median(host[name])})
    return rows


def spread(times: list[float]) -> float:
    """Largest over smallest time of the rounds."""
    return max(times) / min(times)


def main() -> None:
    """Measure, print, and keep the JSON under the device's name."""
    arguments = parser().parse_args()
    import torch

    if not torch.cuda.is_available():
        raise MorphoQuantError("this machine has no GPU; run it on one, or estimate with benchmarks.gpu_cost_model")
    from rich.console import Console
    from rich.table import Table

    device = torch.cuda.get_device_name()
    table = Table(title=f"{device}, G = {arguments.group_size}: microseconds (x over bf16), of the host without graphs")
    for heading in ("layer", "M", *arguments.methods):
        table.add_column(heading, justify="right")
    rows = []
    name = f"{device.replace(' ', '-')}-G{arguments.group_size}"
    # Our kernels run without vLLM.
    asked = bool(set(arguments.methods) & set(PEERS))
    refused = why_no_vllm() if asked else ""
    with vllm_context() if asked and not refused else nullcontext():
        for layer in arguments.layers:
            rows += measure(layer, arguments, refused)
            # Written after each layer, so a later failure loses nothing.
            result = {"device": device, "group_size": arguments.group_size, "versions": versions(), "rows": rows}
            write_results(arguments.results, name, result, markdown(result))
    for (layer, tokens), found in by_point(rows).items():
        table.add_row(layer, str(tokens), *cells(found))
    Console().print(table)


if __name__ == "__main__":
    with one_line_errors():
        main()
