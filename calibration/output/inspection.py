"""Shows the content of a checkpoint, as a table for people and as a dict for programs; reads headers and masks only."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibration.output.report_file import ExpertsReport, LayerReport, read_report
from morphoquant_vllm.format.checkpoint import StoredTensor, check_headers, read_headers, read_spec
from morphoquant_vllm.format.files import REPORT_FILE, open_file
from morphoquant_vllm.format.layers import TWO_LEVEL_SCHEME, experts_input, input_holder, stored_name, tensor_specs
from morphoquant_vllm.format.schema import QuantizationSpec

# Bytes per element, by safetensors' names; carried tensors may have any of these.
ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ELEMENT_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
SIXTEEN_BIT = 2
# Shares from here on are written with an exponent.
_LONG_SHARE = 1e4


def inspect_data(directory: Path) -> dict[str, Any]:
    """Layers, masked channels, escape rates and sizes of a checkpoint, as a JSON object.

    Sizes are in bytes. Figures of the calibration report are None if that file is missing. Raises MorphoQuantError if
    the directory is not a MorphoQuant checkpoint, or if its report file is damaged.
    """
    directory = Path(directory)
    spec = read_spec(directory)
    files = check_headers(directory, spec)
    stored = read_headers(directory)
    report = read_report(directory)
    measured = {} if report is None else report.layers
    layers = [
        _layer_data(directory, name, spec, files, stored, measured.get(name, LayerReport())) for name in spec.layers
    ]
    figures = {} if report is None else report.experts
    experts = [
        _experts_data(directory, name, spec, files, stored, figures.get(name, ExpertsReport())) for name in spec.experts
    ]
    total = sum(_tensor_bytes(tensor) for tensor in stored.values())
    rate = None if report is None else report.escape_rate
    return {
        "directory": str(directory),
        "created_by": spec.created_by,
        "rows": list(spec.rows),
        "tensor_parallel": spec.tensor_parallel,
        "calibration_report": REPORT_FILE if report is not None else None,
        "architecture": None if report is None else report.architecture,
        "sixteen_bit": [] if report is None else report.sixteen_bit,
        "bits": None if report is None or report.bits is None else report.bits.model_dump(),
        "layers": layers,
        "experts": experts,
        "totals": _totals(layers, experts, total, rate),
    }


def _totals(
    layers: list[dict[str, Any]], experts: list[dict[str, Any]], total: int, rate: float | None
) -> dict[str, Any]:
    """The figures of a checkpoint of `total` bytes with the escape rate `rate`."""
    quantized, quantized_16bit = (sum(layer[key] for layer in layers + experts) for key in ("bytes", "bytes_16bit"))
    return {
        "layers": len(layers),
        "experts": sum(entry["count"] for entry in experts),
        "bytes": total,
        "bytes_16bit": total - quantized + quantized_16bit,
        "quantized_bytes": quantized,
        "quantized_bytes_16bit": quantized_16bit,
        "escape_rate": rate,
        "effective_activation_bits": None if rate is None else effective_bits(rate),
    }


def effective_bits(escape_rate: float) -> float:
    """Average bits per activation code: an escape takes 8 bits, other codes take 4."""
    return 4 + 4 * escape_rate


def _tensor_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * ELEMENT_BYTES.get(tensor.dtype, SIXTEEN_BIT)


def _layer_data(
    directory: Path,
    name: str,
    spec: QuantizationSpec,
    files: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    measured: LayerReport,
) -> dict[str, Any]:
    layer = spec.layers[name]
    names = [stored_name(name, tensor) for tensor in tensor_specs(layer, len(spec.rows), spec.tensor_parallel)]
    bias_bytes = 0
    if layer.bias:
        bias_bytes = _tensor_bytes(stored[stored_name(name, "bias")])
    return {
        "name": name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "group_size": layer.group_size,
        "scale_scheme": layer.scale_scheme,
        "weight_bits": layer.weight_bits,
        "parallel": layer.parallel,
        "shared_input": layer.shared_input,
        "masked_channels": _masked_channels(directory, name, spec, files),
        "escape_rate": measured.escape_rate,
        "output_error": measured.output_error,
        "own_rows": [row for row, choice in measured.modality_rows.items() if choice.own],
        "bytes": sum(_tensor_bytes(stored[tensor]) for tensor in names) + bias_bytes,
        "bytes_16bit": layer.out_features * layer.in_features * SIXTEEN_BIT + bias_bytes,
    }


def _masked_channels(directory: Path, layer: str, spec: QuantizationSpec, files: Mapping[str, str]) -> dict[str, int]:
    """Channels of a layer's input that may escape, by row name."""
    name = stored_name(layer, "modality_mask")
    with open_file(directory / files[name]) as file:
        masked: torch.Tensor = file.get_tensor(name).sum(1)
    return dict(zip(spec.rows, masked.tolist(), strict=True))


def _experts_data(
    directory: Path,
    name: str,
    spec: QuantizationSpec,
    files: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    measured: ExpertsReport,
) -> dict[str, Any]:
    """One list of experts; figures by expert are lists, and those of the input are gate's and up's."""
    settings = spec.experts[name]
    names = [stored_name(linear, tensor) for linear in settings.layers(name) for tensor in spec.stored_tensors(linear)]
    elements = 3 * settings.count * settings.in_features * settings.intermediate_features
    return {
        "name": name,
        "count": settings.count,
        "in_features": settings.in_features,
        "intermediate_features": settings.intermediate_features,
        "group_size": settings.group_size,
        "scale_scheme": settings.scale_scheme,
        "shared_input": experts_input(name),
        "masked_channels": _masked_channels(directory, input_holder(name), spec, files),
        "escape_rate": measured.input.escape_rate,
        "output_error": measured.input.output_error,
        "tokens": measured.tokens,
        "drawn_tokens": measured.drawn_tokens,
        "few": measured.few,
        "none": measured.none,
        "gate_up_error": measured.gate_up_error,
        "down_error": measured.down_error,
        "down_escape_rate": measured.down_escape_rate,
        "bytes": sum(_tensor_bytes(stored[tensor]) for tensor in names),
        "bytes_16bit": elements * SIXTEEN_BIT,
    }


def inspect_table(directory: Path) -> RenderableType:
    """The same as a rich renderable: one line per layer, then the totals; layer names fold on narrow terminals."""
    data = inspect_data(directory)
    # Names of a model share a long prefix: shown once, it leaves room for the figures.
    prefix = common_prefix([layer["name"] for layer in data["layers"] + data["experts"]])
    title = Text(f"layers below {prefix}") if prefix else None
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column("layer", overflow="fold")
    # A checkpoint of 4-bit weights alone has no column for it.
    several = eight_bit_layers(data) > 0
    for heading in ("NxK", *(["bits"] if several else []), "G", "masked", "escapes", "size", "of\n16 bit"):
        # Figures must not be wrapped; names may be.
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in data["layers"]:
        table.add_row(
            # Text: a name must not be read as markup.
            Text(layer["name"].removeprefix(prefix)),
            f"{layer['out_features']}x{layer['in_features']}",
            *([str(layer["weight_bits"])] if several else []),
            str(layer["group_size"]),
            _masked(layer["masked_channels"]),
            percent((layer["escape_rate"] or {}).get("all")),
            size_text(layer["bytes"]),
            percent(layer["bytes"] / layer["bytes_16bit"]),
        )
    for experts in data["experts"]:
        table.add_row(
            Text(f"{experts['name'].removeprefix(prefix)} ({experts['count']})"),
            f"{experts['intermediate_features']}x{experts['in_features']}",
            *(["4"] if several else []),
            str(experts["group_size"]),
            _masked(experts["masked_channels"]),
            percent((experts["escape_rate"] or {}).get("all")),
            size_text(experts["bytes"]),
            percent(experts["bytes"] / experts["bytes_16bit"]),
        )
    return Group(table, Text("\n".join(_summary(data))))


def _summary(data: Mapping[str, Any]) -> list[str]:
    totals = data["totals"]
    lines = [
        f"masked: channels that may escape to 8 bits, in rows {'/'.join(data['rows'])} (one figure if all agree)",
        f"quantized layers: {totals['layers']}{_and_experts(totals)}, {size_text(totals['quantized_bytes'])}, "
        f"{percent(totals['quantized_bytes'] / totals['quantized_bytes_16bit'])} of 16 bit",
        *_experts_summary(data["experts"]),
        f"whole checkpoint: {size_text(totals['bytes'])}, {percent(totals['bytes'] / totals['bytes_16bit'])} of "
        f"{size_text(totals['bytes_16bit'])} with those layers in 16 bit",
    ]
    if data["architecture"]:
        lines.append(f"architecture: {data['architecture']}")
    if data["sixteen_bit"]:
        first, *others = data["sixteen_bit"]
        more = f" and {len(others)} more" if others else ""
        lines.append(f"in 16 bit, since no group size divides K: {first}{more}")
    lines += _bits_summary(data)
    two_level = sum(layer["scale_scheme"] == TWO_LEVEL_SCHEME for layer in data["layers"])
    if two_level:
        lines.append(f"two-level weight scales: {two_level} of {totals['layers']} layers")
    own_rows = Counter(row for layer in data["layers"] for row in layer["own_rows"])
    if own_rows:
        each = ", ".join(f"{row} {count}" for row, count in own_rows.items())
        lines.append(f"layers with a modality-specific row, of {totals['layers']}: {each}")
    if totals["escape_rate"] is not None:
        lines.append(
            f"escape rate in calibration: {percent(totals['escape_rate'])}; "
            f"effective activation bits: {totals['effective_activation_bits']:.2f} (4 + 4 * rate)"
        )
    elif data["calibration_report"] is None:
        lines.append(f"escape rates: unknown, {REPORT_FILE} is missing")
    else:
        lines.append(f"escape rates: unknown, {REPORT_FILE} states none")
    return lines


def eight_bit_layers(data: Mapping[str, Any]) -> int:
    """Number of layers of `inspect_data` with 8-bit weights."""
    return sum(layer["weight_bits"] == 8 for layer in data["layers"])


def _bits_summary(data: Mapping[str, Any]) -> list[str]:
    """Lines about 8-bit weights, and about inputs that `bits_budget` left in 16 bit."""
    count = eight_bit_layers(data)
    lines = [f"8-bit weights: {count} of {data['totals']['layers']} layers; served on CPUs only"] if count else []
    bits = data["bits"]
    if bits is not None:
        kept = f"; in 16 bit: {', '.join(bits['sixteen_bit'])}" if bits["sixteen_bit"] else ""
        lines.append(f"bits of a weight, with its scale: {bits['mean']:.3f} (bits_budget {bits['budget']:g}){kept}")
    return lines


def _and_experts(totals: Mapping[str, Any]) -> str:
    return f" and {totals['experts']} experts" if totals["experts"] else ""


def _experts_summary(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The line about the experts' tokens in calibration; none without experts, or without a report."""
    drawn = [count for entry in experts for count in entry["drawn_tokens"]]
    if not drawn:
        return []
    few, none = (sum(entry[key] or 0 for entry in experts) for key in ("few", "none"))
    return [
        f"experts: NxK of gate and up; drawn tokens of an expert: {min(drawn)} to {max(drawn)}, "
        f"{statistics.median(drawn):.0f} in the middle; {few} had few, {none} none"
    ]


def common_prefix(names: list[str]) -> str:
    """The dotted beginning that every name shares, its last dot included; empty for a single name."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _masked(channels: Mapping[str, int]) -> str:
    counts = list(channels.values())
    return str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))


def percent(fraction: float | None) -> str:
    """A share for people; "-" if it is unknown."""
    if fraction is None:
        return "-"
    return f"{100 * fraction:.2f}%" if fraction < _LONG_SHARE else f"{100 * fraction:.2g}%"


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
