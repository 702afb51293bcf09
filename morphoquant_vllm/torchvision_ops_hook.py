"""Declares torchvision's two detection operators where its compiled ones do not load.

`morphoquant_vllm/mends.py` copies this file into an environment's site-packages and adds a `.pth` line that calls
`install()`, so every process of that environment has it, the engine's children included. Only torchvision's
transforms are used; the operators are declared, not implemented, and calling one still fails.
"""

from __future__ import annotations

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionFinder:
    """An import hook that finds nothing: it declares the schemas once, just before torchvision is found."""

    def __init__(self) -> None:
        self.library: object = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave the search to Python's own finders, which is what returning None means."""
        if name == "torchvision" and self.library is None:
            import torch  # here, not above: this module is loaded by every start of Python

            # The declarations are withdrawn when the Library object goes, so it is kept.
            self.library = library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)


def install() -> None:
    """Put the hook before Python's own finders, once: Python reads a virtual environment's .pth lines twice."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())
