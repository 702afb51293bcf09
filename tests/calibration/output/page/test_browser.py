"""The page in a real browser: every figure has a box on the screen, and something is drawn in it."""

import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.output.page.render import write_page
from tests.calibration.output.page.test_render import colours

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser found: apt-get install chromium"),
]
WIDTH, HEIGHT = 1000, 12000
# Writes the position and decoded size of each figure's image into the page.
MEASURE = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure")].map(figure => {
    const image = figure.querySelector("img"), box = image.getBoundingClientRect();
    return [figure.id, box.left, box.top, box.right, box.bottom, image.naturalWidth];
  });
  document.body.setAttribute("data-boxes", JSON.stringify(boxes));
  document.body.setAttribute("data-width", document.documentElement.scrollWidth);
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


def test_every_figure_is_drawn_on_the_screen(omni_directory: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    content = write_page(omni_directory, page, ["*.0.mlp.down_proj", "*.1.self_attn.q_proj"])
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    dom = browse("--virtual-time-budget=5000", "--dump-dom", measured.as_uri())
    found = re.search(r'data-boxes="([^"]+)" data-width="(\d+)"', dom)
    assert found is not None, dom[-500:]
    assert int(found[2]) <= WIDTH, "nothing runs off to the right"
    boxes = json.loads(html.unescape(found[1]))
    assert len(content.chosen) == 2
    assert len(boxes) == 3 + 2 * len(content.chosen)

    shot = tmp_path / "page.png"
    browse(f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"))
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
