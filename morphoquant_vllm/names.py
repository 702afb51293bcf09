"""`python -m morphoquant_vllm.names DIR`: does vLLM find every quantized layer under its name?

    python -m morphoquant_vllm.names OUT                    a checkpoint
    python -m morphoquant_vllm.names MODEL --layers FILE    a 16-bit model, and the quantization_config that is planned

FILE - is the standard input. vLLM's model is built without weights, in this process. Exit status 3 means that a layer
is missing, 4 that vLLM cannot build the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.schema import QuantizationSpec

# Python itself ends with 1 and argparse with 2.
MISSING, NOT_BUILT = 3, 4


def main(arguments: list[str] | None = None) -> int:
    """Check the names, and print one line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m morphoquant_vllm.names", description="Does vLLM find every quantized layer under its name?"
    )
    parser.add_argument("directory", type=Path, help="a MorphoQuant checkpoint, or a 16-bit model with --layers")
    parser.add_argument("--layers", help="JSON file of the planned quantization_config; - is the standard input")
    chosen = parser.parse_args(arguments)
    try:
        spec = _planned(chosen.layers) if chosen.layers else read_spec(chosen.directory)
        found = _check(chosen.directory, spec)
    except MorphoQuantError as problem:
        print(problem, file=sys.stderr)
        return MISSING
    # Whatever vLLM raises is the reason.
    except Exception as problem:
        reason = " ".join(str(problem).split())[:300]
        print(f"{chosen.directory}: vLLM cannot build this model ({reason})", file=sys.stderr)
        return NOT_BUILT
    print(f"{chosen.directory}: vLLM's {found} has all {len(spec.linears)} layers")
    return 0


def _check(directory: Path, spec: QuantizationSpec) -> str:
    from morphoquant_vllm.plugin.model_names import check_model

    return check_model(directory, spec)


def _planned(file: str) -> QuantizationSpec:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return QuantizationSpec.from_dict(json.loads(text))
    except (OSError, ValueError, AttributeError, RecursionError) as problem:
        raise MorphoQuantError(f"--layers: {file} cannot be read ({problem}); give a quantization_config") from problem


if __name__ == "__main__":
    # vLLM's own messages.
    logging.disable(logging.WARNING)
    sys.exit(main())
