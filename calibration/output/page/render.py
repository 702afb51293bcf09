"""Draws the pictures, fills the template and writes the page to one file."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from calibration.output.inspection import common_prefix, eight_bit_layers, percent, size_text
from calibration.output.page import figures
from calibration.output.page.content import Content, gather
from calibration.output.page_file import check_page, write_page
from morphoquant_vllm.errors import one_line

CAPTIONS = {
    "sizes": "Weights on disk: the quantized layers, and the carried tensors.",
    "losses": "Above: error of each layer's output on the calibration sample, relative to the 16-bit layer's on "
    "16-bit inputs. Below: share of its activation codes that leave the 4-bit range.",
    "dispersion": "Dispersion of the channels of each input, (max - min) / log1p(mean|x|): largest channel (solid), "
    "99th percentile (dashed), median (dotted). High means a long tail.",
    "channels": "Values of each channel by modality, before quantization. The band is the range of 4-bit codes. Red "
    "marks values beyond it on channels that may escape; they take 8-bit codes on the same grid. Ticks at 0 mark "
    "channels that may escape. Half the channels shown are the most dispersed ones, the others are evenly spaced.",
    "codes": "Frequency of each code, over all channels of the input.",
}
# Characters of a value that the page shows.
LONGEST_CELL = 200
FIGURE = Markup(
    '<figure id="{name}"><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption>'
    "</figure>"
)


def write_report(directory: Path, output: Path, patterns: Sequence[str] = (), *, overwrite: bool = False) -> Content:
    """Write the page about the checkpoint `directory` to the file `output`; returns its content.

    `patterns` choose the layers that are drawn channel by channel. Nothing is written if a MorphoQuantError is raised.
    Its reasons: the directory is not a checkpoint, no layer matches, or `output` cannot be written or may not be
    replaced.
    """
    check_page(output, overwrite=overwrite)
    content = gather(directory, patterns)
    write_page(render(content), output, overwrite=overwrite)
    return content


def render(content: Content) -> str:
    """The HTML with embedded pictures."""
    drawn = draw(content)

    def figure(name: str) -> Markup:
        data = base64.b64encode(drawn[name]).decode()
        return FIGURE.format(name=name, caption=CAPTIONS[name.split("-")[0]], data=data)

    environment = Environment(
        loader=PackageLoader("calibration.output.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"short": short, "span": span, "shares": shares}
    escape_rows = [
        row
        for row in (*content.spec.rows, "all")
        if any(row in (layer["escape_rate"] or {}) for layer in content.inspected["layers"])
    ]
    names = [entry["name"] for kind in ("layers", "experts") for entry in content.inspected[kind]]
    return environment.get_template("page.html.j2").render(
        content=content,
        totals=content.inspected["totals"],
        escape_rows=escape_rows,
        prefix=common_prefix(names),
        eight_bit=eight_bit_layers(content.inspected),
        has_distributions=any(entry.distribution for entry in content.inputs),
        figure=figure,
        percent=percent,
        size=size_text,
    )


def short(value: object) -> str:
    """A value from a file as one line of text for the page, whatever its type."""
    values = value if isinstance(value, list) else [value]
    return one_line(", ".join(map(str, values)), LONGEST_CELL)


def span(counts: Sequence[int]) -> str:
    """Smallest, middle and largest of some counts; "-" without any."""
    return f"{min(counts)} / {statistics.median(counts):.0f} / {max(counts)}" if counts else "-"


def shares(values: Sequence[float | None]) -> str:
    """Middle and largest of some shares; "-" without any."""
    known = [value for value in values if value is not None]
    return f"{percent(statistics.median(known))} / {percent(max(known))}" if known else "-"


def draw(content: Content) -> dict[str, bytes]:
    """Every picture as PNG, by its name on the page."""
    drawn: dict[str, Any] = {"sizes": figures.sizes(content), "losses": figures.losses(content)}
    if any(entry.distribution for entry in content.inputs):
        drawn["dispersion"] = figures.dispersion(content)
    for number, entry in enumerate(content.chosen, start=1):
        drawn[f"channels-{number}"] = figures.channels(entry, content.spec.rows)
        drawn[f"codes-{number}"] = figures.codes(entry, content.spec.rows)
    return drawn
