"""The modality bus: it carries each token's row from the embedding, which sees its id, to the quantized linears.

One buffer per model and process holds the row of every token of the step. vLLM embeds the tokens of a step eagerly,
before it runs the decoder on them. This holds for prefill chunks, cached prefixes and decoded tokens. A hook on the
embedding fills the buffer, and every quantized linear of the decoder reads it. The buffer starts as 'any'. It stays so
if the tokens of the linears may differ from those of the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config

from morphoquant_vllm.format.schema import ANY_ROW, QuantizationSpec
from morphoquant_vllm.format.token_table import row_table, unlisted_media
from morphoquant_vllm.plugin.lm_head import SixteenBitHeadMethod
from morphoquant_vllm.plugin.log import plugin_logger

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

logger = plugin_logger(__name__)


def off_reason(config: VllmConfig) -> str | None:
    """Why the embedding and the linears of this engine may get different tokens; None if they get the same."""
    model, parallel = config.model_config, config.parallel_config
    reasons = {
        # A text model's embedding is part of the compiled graph; it has no use for rows either.
        "the engine takes no media": not takes_media(config),
        # Cross-attention reads the encoder's states, not the tokens.
        "the model is an encoder-decoder": model is not None and model.is_encoder_decoder,
        # Tokens that were embedded elsewhere have no ids.
        "prompts may come as embeddings": model is not None and model.enable_prompt_embeds,
        "pipeline parallelism: later ranks see no token ids": parallel.pipeline_parallel_size > 1,
        "context parallelism: a rank's linears get a part of the tokens": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "microbatching: linears get a part of the tokens": parallel.use_ubatching,
        # The shared experts beside them are quantized linears, too.
        "sequence-parallel experts: linears get a part of the tokens": parallel.use_sequence_parallel_moe,
        "LoRA: its embedding bypasses the hook": config.lora_config is not None,
        "speculative decoding: drafts go through the same embedding": config.speculative_config is not None,
        "fast prefill: later layers get a part of the tokens": config.cache_config.kv_sharing_fast_prefill,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def takes_media(config: VllmConfig) -> bool:
    """Whether vLLM embeds this engine's tokens before it runs the model, since some may be those of media."""
    model = config.model_config
    if model is None or not model.is_multimodal_model:
        return False
    try:
        return bool(taken_media(config)) or model.get_multimodal_config().enable_mm_embeds
    except ValueError:
        # A draft of a multimodal model has no processor.
        return False


# The buffer of an embedding that holds the row of each token id.
TABLE = "morphoquant_rows"


def taken_media(config: VllmConfig) -> set[str]:
    """Modalities that this engine of a multimodal model accepts, by vLLM's names."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    limits = MULTIMODAL_REGISTRY.get_processing_info(config.model_config).allowed_mm_limits
    return {modality for modality, limit in limits.items() if limit > 0}


def table_of(embedding: torch.nn.Module) -> Tensor:
    """The row of each token id, int32 [V], of an embedding that fills a bus."""
    table: Tensor = getattr(embedding, TABLE)
    return table


class ModalityBus:
    """The row of each token of a step, int32 [max_num_batched_tokens]; one per model and process."""

    def __init__(self, spec: QuantizationSpec) -> None:
        self.spec = spec
        self.buffer: Tensor | None = None
        self._configured: list[tuple[torch.nn.Module, RemovableHandle]] = []
        # Embeddings to which the model passes no quantization config; used if there are no others.
        self._unconfigured: list[tuple[torch.nn.Module, RemovableHandle]] = []

    def attach(self, embedding: torch.nn.Module, *, passed: bool = True) -> None:
        """Let `embedding` fill the buffer. A model with two embeddings of token ids is served with 'any'.

        `passed` says that the model passes its embedding a quantization config; those are preferred. One that is built
        after the model is a draft's: it embeds other tokens than those of a step.
        """
        if self.buffer is not None:
            return
        hook = embedding.register_forward_pre_hook(self._fill, with_kwargs=True)
        (self._configured if passed else self._unconfigured).append((embedding, hook))

    def rows(self, device: torch.device) -> Tensor:
        """The buffer. The first call comes when all layers exist; it decides and logs whether the buffer is filled."""
        if self.buffer is None:
            self._start(get_current_vllm_config(), device)
        assert self.buffer is not None
        return self.buffer

    def _start(self, config: VllmConfig, device: torch.device) -> None:
        tokens = config.scheduler_config.max_num_batched_tokens
        self.buffer = torch.full((tokens,), self.spec.any_row, dtype=torch.int32, device=device)
        if not self._configured:
            self._configured, self._unconfigured = self._unconfigured, []
        for _, handle in self._unconfigured:
            handle.remove()
        reason = self._off_reason(config)
        if reason is None:
            embedding = self._configured[0][0]
            table = row_table(self.spec, int(embedding.num_embeddings)).to(device)  # type: ignore[arg-type]
            # A buffer: vLLM's sleep drops all other tensors that were made while the model was loaded.
            embedding.register_buffer(TABLE, table, persistent=False)
            logger.info_once(
                "MorphoQuant: every token is quantized by its modality's row; placeholder tokens %s",
                str({row: list(ids) for row, ids in self.spec.placeholder_token_ids.items()}),
            )
            return
        for _, handle in self._configured:
            handle.remove()
        logger.info_once("MorphoQuant: row '%s' quantizes the tokens of every modality (%s)", ANY_ROW, reason)

    def _off_reason(self, config: VllmConfig) -> str | None:
        placeholders = [token for ids in self.spec.placeholder_token_ids.values() for token in ids]
        if not placeholders:
            return "the checkpoint names no placeholder tokens"
        reason = off_reason(config)
        if reason is not None:
            return reason
        if len(self._configured) != 1:
            return f"the model has {len(self._configured)} token embeddings, not one"
        unlisted = unlisted_media(taken_media(config), config.model_config.hf_config.to_dict(), self.spec)
        if unlisted:
            # As in vLLM's InternVL, whose config names the image token alone.
            return f"the token table does not list the tokens of {' or '.join(unlisted)}"
        vocabulary = int(self._configured[0][0].num_embeddings)  # type: ignore[arg-type]
        outside = [token for token in placeholders if token >= vocabulary]
        if outside:
            # vLLM masks the ids of all media before it embeds them.
            return f"placeholder token {outside[0]} is outside the vocabulary of {vocabulary}"
        return None

    def _fill(self, embedding: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the embedding: write the rows of M ids (any shape and integer dtype); later entries stay."""
        if self.buffer is None:
            return
        ids = (args[0] if args else kwargs["input_"]).reshape(-1)
        if ids.numel() > self.buffer.numel():
            self.buffer.fill_(self.spec.any_row)
            warn_of_long_step(ids.numel(), self.buffer.numel())
            return
        table = table_of(embedding)
        self.buffer[: ids.numel()].copy_(table[ids.clamp(-1, table.numel() - 1)])


def rows_of_step(buffer: Tensor, x: Tensor, any_row: int) -> Tensor:
    """Row of each token of x [M, K], int32 [M or more]: the bus's `buffer`, or 'any' for a longer step."""
    # vLLM compiles for at most the buffer's tokens, so the graph needs no second branch.
    if torch.compiler.is_compiling() or x.shape[0] <= buffer.numel():
        return buffer
    warn_of_long_step(x.shape[0], buffer.numel())
    return torch.full(x.shape[:1], any_row, dtype=torch.int32, device=x.device)


def warn_of_long_step(tokens: int, held: int) -> None:
    """Log once that a step has more tokens than the buffer: they are served with row 'any'."""
    logger.warning_once("MorphoQuant: row '%s' serves a step of %d tokens; %d were announced", ANY_ROW, tokens, held)


class ModalityEmbeddingMethod(SixteenBitHeadMethod):
    """vLLM's 16-bit embedding, which also passes its token ids to the bus."""

    def __init__(self, bus: ModalityBus) -> None:
        super().__init__()
        self.bus = bus
        self.prepared = False

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        self.bus.attach(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Deferred to the next `apply`: on a CPU, vLLM would pack a second copy that only tied heads need."""
        self.prepared = False

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # Only called if the model's head is the embedding itself.
        if not self.prepared:
            super().process_weights_after_loading(layer)
            self.prepared = True
        return super().apply(layer, x, bias)
