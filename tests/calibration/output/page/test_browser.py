"""The page in a real browser: every figure has a box on the screen, and something is drawn in it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.output.page.render import write_report
from tests.calibration.output.page.test_render import colours

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser found: apt-get install chromium"),
]
WIDTH, HEIGHT = 1000, 12000
# Of a phone. No window of the browser is as narrow, so a frame is.
PHONE_WIDTH = 390
# Text of a figure has 8 points in a picture of about 1100 pixels: here 10 pixels.
LEGIBLE_WIDTH = 800
LIGHT, DARK = 1, 0
# Tells the page, or the page around it, the position and decoded size of each figure's image.
MEASURE = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure")].map(figure => {
    const image = figure.querySelector("img"), box = image.getBoundingClientRect();
    return [figure.id, box.left, box.top, box.right, box.bottom, image.naturalWidth];
  });
  parent.postMessage([JSON.stringify(boxes), document.documentElement.scrollWidth], "*");
});
</script>"""
KEEP = """<script>
addEventListener("message", event => {
  document.body.setAttribute("data-boxes", event.data[0]);
  document.body.setAttribute("data-width", event.data[1]);
});
</script>"""


def browse(*arguments: str) -> str:
    """Run the browser once, without a network or a profile of its own."""
    assert BROWSER is not None
    line = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={WIDTH},{HEIGHT}",
    ]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measurements(page: Path) -> tuple[int, list[Any]]:
    """Width that the page takes; name, left, top, right, bottom and natural width of each figure's image."""
    dom = browse("--virtual-time-budget=5000", "--dump-dom", page.as_uri())
    found = re.search(r'data-boxes="([^"]+)" data-width="(\d+)"', dom)
    assert found is not None, dom[-500:]
    return int(found[2]), json.loads(html.unescape(found[1]))


def screenshot(page: Path, *arguments: str) -> np.ndarray:
    """The window's pixels, [HEIGHT, WIDTH, 3]."""
    shot = page.with_suffix(".png")
    browse(f"--screenshot={shot}", *arguments, page.as_uri())
    return np.asarray(Image.open(shot).convert("RGB"))


def test_every_figure_is_drawn_on_the_screen(omni_directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    content = write_report(omni_directory, page, ["*.0.mlp.down_proj", "*.1.self_attn.q_proj"])
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", f"{KEEP}{MEASURE}</body>"))
    width, boxes = measurements(measured)
    assert width <= WIDTH, "nothing runs off to the right"
    assert len(content.chosen) == 2
    assert len(boxes) == 3 + 2 * len(content.chosen)

    pixels = screenshot(page)
    assert pixels.shape[:2] == (HEIGHT, WIDTH)
    last = 0.0
    for name, left, top, right, bottom, natural in boxes:
        assert natural > 500, f"{name} did not decode"
        assert right - left > 500 and bottom - top > 100, name
        assert top >= last, f"{name} overlaps the figure before"
        assert bottom <= HEIGHT, f"{name} lies below the screenshot"
        last = bottom
        inside = pixels[int(top) + 1 : int(bottom) - 1, int(left) + 1 : int(right) - 1].reshape(-1, 3)
        ink = (np.abs(inside.astype(int) - 255).sum(1) > 60).mean()
        assert 0.01 < ink < 0.9, (name, ink)
        assert colours(inside) > 50, name


@pytest.mark.full
def test_on_a_phone_figures_keep_a_legible_width_and_the_page_does_not_run_sideways(
    omni_directory: Path, tmp_path: Path
) -> None:
    inner, frame = tmp_path / "inner.html", tmp_path / "frame.html"
    write_report(omni_directory, inner, ["*.0.mlp.down_proj"])
    inner.write_text(inner.read_text().replace("</body>", f"{MEASURE}</body>"))
    frame.write_text(f'<body>{KEEP}<iframe src="{inner.name}" width="{PHONE_WIDTH}" height="{HEIGHT}"></iframe></body>')
    width, boxes = measurements(frame)
    assert width <= PHONE_WIDTH
    assert len(boxes) == 5
    assert all(right - left >= LEGIBLE_WIDTH for _, left, _, right, _, _ in boxes)


@pytest.mark.full
def test_a_reader_who_wants_darkness_gets_it_around_light_figures(omni_directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(omni_directory, page, ["*.0.mlp.down_proj"])
    light, dark = (screenshot(page, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (LIGHT, DARK))
    assert light[:4].min() > 250 and dark[:4].max() < 40
    # The figures' white is most of what is bright; text on the dark ground is bright, too.
    assert 0.02 < (dark.min(-1) > 250).mean() < (light.min(-1) > 250).mean() / 2
    heading = dark[:120, : WIDTH // 2]
    assert heading.max() > 200, "text can be read"
