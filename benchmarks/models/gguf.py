"""Plain Hugging Face directories of bfloat16 weights, made from GGUF files: their values, dequantized."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def write_model(source: Path, directory: Path, **tokenizer_settings: Any) -> Path:
    """Write config, bfloat16 weights and tokenizer of a GGUF file to `directory`, unless they are there."""
    if (directory / "config.json").is_file():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, **tokenizer_settings)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers notes the weights' origin as a quantization, but the saved weights are plain bfloat16.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)
    return directory
