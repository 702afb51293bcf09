"""python -m benchmarks.load_check.worker DIR LEVEL: construct one engine and print the seconds that it took."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.load_check.engine import LEVELS, MARK


def check_headers_alone(directory: Path) -> None:
    """Run the checks that existed before format v3."""
    from morphoquant_vllm.format.checkpoint import check_headers, read_spec

    check_headers(directory, read_spec(directory))


def main() -> None:
    """Construct the engine; the time of vLLM's imports is excluded."""
    directory, level = sys.argv[1:]
    assert level in LEVELS
    from vllm import LLM

    from morphoquant_vllm.plugin import checkpoint_check

    if level == "headers":
        checkpoint_check.check_directory = check_headers_alone
    started = time.perf_counter()
    LLM(directory, dtype="bfloat16", max_model_len=512, enforce_eager=True)
    print(f"{MARK}{time.perf_counter() - started}", flush=True)


if __name__ == "__main__":
    main()
