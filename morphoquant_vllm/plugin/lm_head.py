"""lm_head: the 16-bit head, read in place if the CPU allows, and the optional 8-bit head.

The 8-bit head is made from the 16-bit one while the model is loaded, if the user asks for it:

    vllm serve OUT --additional-config '{"morphoquant": {"lm_head": "int8"}}'

vLLM hands `additional_config` to every worker. Each rank quantizes each output channel of its vocabulary separately,
so logits do not depend on the tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from morphoquant_vllm import backends, ops
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.host_memory import move_to_large_pages, zero_bytes
from morphoquant_vllm.numerics.head import quantize_outputs
from morphoquant_vllm.plugin.log import plugin_logger
from morphoquant_vllm.plugin.reload import ReloadCheck

logger = plugin_logger(__name__)


def megabytes(*tensors: Tensor) -> float:
    """Size of tensors in MB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


class SixteenBitHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's 16-bit head. On a CPU with AVX512-BF16 and without AMX, it multiplies with the loaded weight itself.

    vLLM's product keeps a second, packed copy of the weight, and reads it more slowly. A tied head makes its copy anew
    after `reload_check` saw that weights were loaded again: vLLM processes only the embedding then.
    """

    in_place = tied = False

    def __init__(self, reload_check: ReloadCheck | None = None) -> None:
        self.reload_check = reload_check
        self.made_after = 0

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        self.tied = True
        tied: torch.nn.Module = super().tie_weights(layer, embed_tokens)
        return tied

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        move_to_large_pages(layer.weight)  # type: ignore[arg-type]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        head = _head_on(weight.device)
        self.in_place = head is not None and head.serves_bfloat16(weight)
        if not self.in_place:
            super().process_weights_after_loading(layer)

    def follow_reload(self, layer: torch.nn.Module) -> None:
        """Process a tied head's weight once more if it was loaded again since."""
        if self.tied and self.reload_check is not None and self.made_after != self.reload_check.layers:
            self.made_after = self.reload_check.layers
            self.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.follow_reload(layer)
        if not self.in_place:
            return super().apply(layer, x, bias)
        return _logits(ops.head_bfloat16(x.reshape(-1, x.shape[-1]), layer.weight), x, bias)


def _head_on(device: torch.device) -> backends.Head | None:
    return backends.BACKENDS[backends.select_backend(device)].head


def _logits(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] plus the head's bias, with the leading dimensions of x [..., K]."""
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


class EightBitHeadMethod(SixteenBitHeadMethod):
    """vLLM's 16-bit head while it is loaded, then codes int8 [N, K] and scale float32 [N]; N is this rank's vocabulary.

    The weight of an untied head is freed. A tied weight belongs to the embedding and stays: the codes are extra.
    """

    supports_pre_processed_weights = False

    def __init__(self, config: VllmConfig, reload_check: ReloadCheck | None = None) -> None:
        super().__init__(reload_check)
        model = config.model_config
        # Logits in another dtype need the weight itself.
        self.head_dtype = model.head_dtype if model is not None else None
        self.eight_bit = False
        self.served: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        reason = self._refused(weight)
        if reason:
            logger.warning_once("MorphoQuant: lm_head stays in 16 bit: %s", reason)
            super().process_weights_after_loading(layer)
            return
        on_cpu = weight.device.type == "cpu"
        place = zero_bytes(weight.numel()).view(torch.int8).view(weight.shape) if on_cpu else None
        codes, scale = quantize_outputs(weight, place)
        if not bool(scale.isfinite().all()):
            raise MorphoQuantError("lm_head.weight: holds NaN or infinite values; the file is damaged")
        head = _head_on(weight.device)
        assert head is not None, "a device without a head is refused above"
        head.check(codes, scale, weight.dtype)
        if self.eight_bit:
            # Weights that vLLM loaded again. It then gives the layer the served buffers back.
            self.served[0].copy_(codes)
            self.served[1].copy_(scale)
            if not self.tied:
                layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
            return
        layer.register_buffer("head_codes", codes, persistent=False)
        layer.register_buffer("head_scale", scale, persistent=False)
        self.served, self.eight_bit = (codes, scale), True
        made, before = megabytes(codes, scale), megabytes(weight)
        if self.tied:
            logger.info_once(
                "MorphoQuant: lm_head in 8 bit takes %.1f MB more: the embedding that it is tied to stays", made
            )
            return
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        logger.info_once("MorphoQuant: lm_head in 8 bit takes %.1f MB instead of %.1f MB", made, before)

    def _refused(self, weight: Tensor) -> str | None:
        head = _head_on(weight.device)
        if head is None:
            return "neither the CPU kernels nor the GPU kernels run here"
        if reason := head.eight_bit_refusal(weight):
            return reason
        if self.head_dtype not in (None, weight.dtype):
            return f"head_dtype {self.head_dtype} needs the weights themselves"
        return None

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.follow_reload(layer)
        if not self.eight_bit:
            return super().apply(layer, x, bias)
        return _logits(ops.head(x.reshape(-1, x.shape[-1]), layer.head_codes, layer.head_scale), x, bias)
