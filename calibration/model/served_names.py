"""Asks vLLM, in a process of its own, whether it would find every planned layer; calibration never imports vLLM."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys

from calibration.model.source import Source
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import QuantizationSpec

logger = logging.getLogger(__name__)

# Exit status of `morphoquant_vllm.names` for a layer that vLLM does not find.
_MISSING = 3


def check_names(source: Source, spec: QuantizationSpec) -> None:
    """Refuse a plan with a layer that vLLM would not find: MorphoQuantError with its line.

    Without vLLM, or if vLLM cannot build the model, the check is skipped and a message says so.
    """
    if importlib.util.find_spec("vllm") is None:
        logger.info("the layers' names are not checked against vLLM, which is not installed here")
        return
    command = [sys.executable, "-m", "morphoquant_vllm.names", str(source.directory), "--layers", "-"]
    done = subprocess.run(command, input=json.dumps(spec.to_dict()), capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode == _MISSING:
        raise MorphoQuantError(last)
    if done.returncode:
        logger.warning("the layers' names are not checked against vLLM: %s", last)
    else:
        logger.info("%s", done.stdout.strip().splitlines()[-1])
