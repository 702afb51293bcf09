"""The loggers of the plugin's modules."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger


# The class of vLLM's loggers, which has info_once and warning_once, is private.
def plugin_logger(module: str) -> Any:
    """vLLM's logger of a module here: vLLM shows the messages of loggers below "vllm"."""
    return init_logger(f"vllm.{module}")
