"""After `import morphoquant_vllm.hf` transformers loads MorphoQuant checkpoints with its own `from_pretrained`.

The quantized linears run on the torch reference (`numerics`): the served numbers, or the exact mode. For studies and
evaluation, not for speed. Imports neither vLLM nor calibration.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    # An ImportError, as whoever guards an import expects.
    raise ImportError(
        "morphoquant_vllm.hf needs the Python package 'transformers'; install morphoquant-vllm[hf]"
    ) from error

from .linear import MorphoQuantLinear
from .quantizer import MorphoQuantHfConfig, MorphoQuantHfQuantizer
from .settings import configure

__all__ = ["MorphoQuantHfConfig", "MorphoQuantHfQuantizer", "MorphoQuantLinear", "configure"]
