"""Makes the model card of a checkpoint: README.md in the form of the Hugging Face Hub. Pure but for one read."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from calibration.output.outcome import experts_errors
from morphoquant_vllm.errors import one_line
from morphoquant_vllm.format.schema import QuantizationSpec

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# Fields of the source's card that also hold for its quantized form.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")
TAGS = ["morphoquant", "vllm", "w4a4", "int4", "quantized"]
# Longer cards are read up to here; a front matter has a few hundred letters.
_LONGEST_FRONT_MATTER = 100_000
_MARK = "---"
WORST_LAYERS = 3
# Spellings of null in YAML.
_NULLS = ("", "~", "null", "Null", "NULL")


def read_front_matter(directory: Path) -> dict[str, str | list[str]]:
    """The fields CARRIED of the card in a source directory; empty if it has none that can be read."""
    path = directory / CARD_FILE
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_FRONT_MATTER)
        first, *lines = text.splitlines() or [""]
        if first.strip() != _MARK or _MARK not in map(str.strip, lines):
            return {}
        end = next(number for number, line in enumerate(lines) if line.strip() == _MARK)
        # All values are text: nothing is a wrong date or number, and the language "no" is not false.
        content = yaml.load("\n".join(lines[:end]), Loader=yaml.BaseLoader)
    # RecursionError: nested brackets.
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        logger.warning("%s: its front matter cannot be read (%s); no licence is carried", path, type(error).__name__)
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: content[name] for name in CARRIED if _is_text(content.get(name))}


def _is_text(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, str) and item not in _NULLS for item in values)


def model_card(
    carried: Mapping[str, str | list[str]],
    spec: QuantizationSpec,
    report: Mapping[str, Any],
    architecture: str,
    nbytes: int,
    source_nbytes: int,
) -> str:
    """The text of README.md, the same for the same run.

    `carried` are fields of the source's card, `report` is the JSON object of the calibration report, `architecture` the
    name in the model's config. `nbytes` are the bytes of all tensors, `source_nbytes` those of the source.
    """
    front = {**carried, "base_model_relation": "quantized", "library_name": "vllm", "tags": TAGS}
    if "base_model" not in carried:
        del front["base_model_relation"]
    sections = (
        _MARK + "\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + _MARK,
        _title(carried, architecture),
        _serving(),
        _meaning(spec, report["escape_rate"]),
        _figures(spec, report, nbytes, source_nbytes),
        _table(
            "Calibration data", ("row", "tokens"), report["data"]["tokens"], f"{report['data']['samples']} samples."
        ),
        _table("Settings", ("setting", "value"), report["settings"]),
        _table("Made with", ("package", "version"), report["versions"]),
    )
    return "\n\n".join(sections) + "\n"


def _title(carried: Mapping[str, str | list[str]], architecture: str) -> str:
    base = carried.get("base_model")
    family = f" of the family of `{_cell(base)}`" if isinstance(base, str) else ""
    licence = (
        f"The licence of the source holds: `{_cell(carried['license'])}`."
        if "license" in carried
        else "The card of the source names no licence that could be read; look it up before you publish this."
    )
    return (
        f"# MorphoQuant W4A4 checkpoint: {_cell(architecture)}\n\n"
        f"A model{family} with 4-bit weights and 4-bit static activations in its quantized layers, for vLLM. {licence}"
    )


def _serving() -> str:
    return (
        "## Serve\n\n"
        "With the package `morphoquant-vllm` beside vLLM, and this directory as `DIR`:\n\n"
        "```sh\nmorphoquant doctor --model DIR\n"
        "VLLM_CPU_KVCACHE_SPACE=4 vllm serve DIR    # GiB for keys and values on a CPU\n```\n\n"
        "vLLM refuses the checkpoint without that package. `morphoquant verify DIR` checks every file."
    )


def _meaning(spec: QuantizationSpec, escape_rate: float) -> str:
    wide = sum(layer.weight_bits == 8 for layer in spec.layers.values())
    eight_bit = f" {wide} linears have 8-bit weights, which are served on CPUs only." if wide else ""
    return (
        "## What W4A4 means here\n\n"
        "Weights have 4 bits. Codes of activations have 4 bits, too, in [-8, 7], unless they escape: then they have 8 "
        "bits, in [-128, 127], on the same grid. "
        f"In calibration {escape_rate:.2%} of the codes escaped, which is {4 + 4 * escape_rate:.2f} bits on average. "
        "Products run on int8 units. Layers that are not listed in `config.json` are in 16 bit." + eight_bit
    )


def _figures(spec: QuantizationSpec, report: Mapping[str, Any], nbytes: int, source_nbytes: int) -> str:
    errors = {name: layer["output_error"] for name, layer in report["layers"].items()} | experts_errors(report)
    worst = sorted(errors, key=lambda name: -errors[name])[:WORST_LAYERS]
    figures = {
        "quantized linears": len(spec.layers),
        **_experts_figures(spec, report),
        "tensors": f"{nbytes / 1e9:.3f} GB, {nbytes / source_nbytes:.2f} of the source's {source_nbytes / 1e9:.3f} GB",
        "escape rate": f"{report['escape_rate']:.2%}",
        "relative output error of a linear, median": f"{statistics.median(errors.values()):.4f}",
        **{f"largest: `{name}`": f"{errors[name]:.4f}" for name in worst},
    }
    note = (
        "The output error is the root mean square error of a linear's output on the calibration data, relative to the "
        "16-bit layer on 16-bit inputs. It is no measure of answers: evaluate those on your task."
    )
    return _table("Figures", ("", "measured in calibration"), figures, note)


def _experts_figures(spec: QuantizationSpec, report: Mapping[str, Any]) -> dict[str, object]:
    experts = report.get("experts", {})
    if not experts:
        return {}
    few, none = (sum(figures[key] for figures in experts.values()) for key in ("few", "none"))
    return {
        "quantized experts": sum(settings.count for settings in spec.experts.values()),
        "experts with few drawn tokens, and with none": f"{few}, {none}",
    }


def _table(title: str, head: tuple[str, str], rows: Mapping[str, Any], note: str = "") -> str:
    lines = [f"## {title}", "", f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([*lines, *(["", note] if note else [])])


def _cell(value: object) -> str:
    """A value in a cell of a table: one line that ends no cell and starts no markup."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return one_line(text, 200).replace("|", "\\|").replace("<", "&lt;")
