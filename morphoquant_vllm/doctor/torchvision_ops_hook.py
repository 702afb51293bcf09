"""Declares torchvision's two detection operators if its compiled ones do not load.

`morphoquant_vllm/doctor/mends.py` copies this file into an environment's site-packages and adds a `.pth` line that
calls `install()`. So every process of that environment has the hook, also the engine's children. Only torchvision's
transforms are used. The operators are declared, not implemented, and a call of one still fails.
"""

from __future__ import annotations

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionFinder:
    """An import hook that finds no module: it declares the schemas once, just before torchvision is imported."""

    def __init__(self) -> None:
        self.library: object = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Return None, which leaves the search to Python's finders."""
        if name == "torchvision" and self.library is None:
            import torch  # not at the top, since every start of Python loads this module

            # The declarations end with the Library object, so it is kept.
            self.library = library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)


def install() -> None:
    """Put the hook before Python's finders, once, since Python reads a virtual environment's .pth lines twice."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())
