"""MorphoQuant for vLLM: 4-bit weights and 4-bit static activations for omni-modal models.

Importing this package imports nothing else: the schema (`schema`, `checkpoint`), the numerics (`numerics`) and the
operators (`ops`) need torch and safetensors only; `config`, `linear_method`, `modality` and `parameters` are the vLLM
plugin.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's general plugins: make `--quantization morphoquant` known. Runs in every vLLM process."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import MorphoQuantConfig
    from .schema import QUANT_METHOD

    register_quantization_config(QUANT_METHOD)(MorphoQuantConfig)
