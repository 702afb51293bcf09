"""After `import morphoquant_vllm.hf` transformers loads MorphoQuant checkpoints with `from_pretrained`.

Quantized linears and experts run on the kernels of the device, or on request on the torch reference (`numerics`), in
served or exact mode. This package is for studies and evaluation; vLLM serves faster. Imports neither vLLM nor
calibration.

    linear     a quantized linear as a module of transformers
    experts    the quantized experts of a block as a module of transformers
    quantizer  the quantizer that `from_pretrained` runs
    settings   served numbers or exact mode, and which row serves which token
"""

from __future__ import annotations

from morphoquant_vllm.errors import missing_package

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    # An ImportError: code that guards an import expects it.
    raise ImportError(f"morphoquant_vllm.hf: {missing_package('transformers', 'hf')}") from error

from morphoquant_vllm.hf.experts import MorphoQuantExperts
from morphoquant_vllm.hf.linear import MorphoQuantLinear
from morphoquant_vllm.hf.quantizer import MorphoQuantHfConfig, MorphoQuantHfQuantizer
from morphoquant_vllm.hf.settings import configure

__all__ = ["MorphoQuantExperts", "MorphoQuantHfConfig", "MorphoQuantHfQuantizer", "MorphoQuantLinear", "configure"]
