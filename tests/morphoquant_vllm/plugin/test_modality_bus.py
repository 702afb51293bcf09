"""The modality bus without an engine: when it switches off, the rows that its hook writes, and unknown ids."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

CAPACITY, VOCABULARY = 8, 20
SPEC = QuantizationSpec(
    layers={"a": LayerSpec(64, 32, 32, "column", "a")}, placeholder_token_ids={"image": (7,), "audio": (9,)}
)
NAMES = {name: index for index, name in enumerate(SPEC.rows)}


def engine_config(**changes: Any) -> Any:
    """The part of vLLM's configuration that decides; a change is named `part.setting` with `__` for the dot."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "is_multimodal_model": True,
            "get_multimodal_config": lambda: SimpleNamespace(enable_mm_embeds=False),
            "is_encoder_decoder": False,
            "enable_prompt_embeds": False,
            "hf_config": SimpleNamespace(to_dict=dict),
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "use_ubatching": False,
            "use_sequence_parallel_moe": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "scheduler_config": {"max_num_batched_tokens": CAPACITY},
    }
    whole = {"lora_config": None, "speculative_config": None}
    for name, value in changes.items():
        part, _, setting = name.partition("__")
        (parts[part] if setting else whole)[setting or part] = value
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


class Embedding(nn.Embedding):
    """As much of vLLM's embedding as the bus looks at."""

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_.clamp(0, VOCABULARY - 1))


def started(
    monkeypatch: pytest.MonkeyPatch,
    spec: QuantizationSpec = SPEC,
    embeddings: int = 1,
    taken: tuple[str, ...] = ("image", "audio"),
    **changes: Any,
) -> Any:
    """A bus as it is when a model is loaded, and its embeddings; `taken` are the media that the engine takes."""
    from morphoquant_vllm.plugin import modality_bus as modality

    monkeypatch.setattr(modality, "taken_media", lambda config: set(taken))
    monkeypatch.setattr(modality, "get_current_vllm_config", lambda: engine_config(**changes))
    bus = modality.ModalityBus(spec)
    made = [Embedding(VOCABULARY, 4) for _ in range(embeddings)]
    for embedding in made:
        bus.attach(embedding)
    bus.rows(torch.device("cpu"))
    return bus, made


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Messages of the plugin; vLLM's logger does not propagate them."""
    logger = logging.getLogger("vllm.morphoquant_vllm.plugin.modality_bus")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield seen
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_the_hook_writes_the_row_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, (embedding,) = started(monkeypatch)
    buffer = bus.rows(torch.device("cpu"))
    assert buffer.tolist() == [NAMES["any"]] * CAPACITY
    embedding(torch.tensor([7, 1, 9, 7], dtype=torch.int32))
    rows = [NAMES[name] for name in ("image", "text", "audio", "image")]
    assert buffer.tolist() == rows + [NAMES["any"]] * 4
    embedding(input_=torch.tensor([[2], [9]]))
    assert buffer.tolist()[:4] == [NAMES["text"], NAMES["audio"], *rows[2:]]
    embedding(torch.tensor([-1, VOCABULARY, 10**6]))
    assert buffer.tolist()[:3] == [NAMES["any"]] * 3
    assert bus.rows(torch.device("cpu")) is buffer, "every linear gets the same tensor"


def test_a_step_longer_than_the_buffer_is_served_with_any(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    bus, (embedding,) = started(monkeypatch)
    embedding(torch.full((CAPACITY,), 7))
    for _ in range(2):
        embedding(torch.full((CAPACITY + 1,), 7))
    assert bus.buffer.tolist() == [NAMES["any"]] * CAPACITY
    assert [message for message in messages if "serves a step of 9 tokens; 8 were announced" in message]
    assert len(messages) == len(set(messages))


REASONS: dict[str, dict[str, Any]] = {
    "pipeline parallelism": {"parallel_config__pipeline_parallel_size": 2},
    "context parallelism": {"parallel_config__decode_context_parallel_size": 2},
    "context parallelism:": {"parallel_config__prefill_context_parallel_size": 2},
    "microbatching": {"parallel_config__use_ubatching": True},
    "sequence-parallel experts": {"parallel_config__use_sequence_parallel_moe": True},
    "LoRA": {"lora_config": object()},
    "speculative decoding": {"speculative_config": object()},
    "prompts may come as embeddings": {"model_config__enable_prompt_embeds": True},
    "takes no media": {"model_config__is_multimodal_model": False},
    "the engine takes no media": {"taken": ()},
    "encoder-decoder": {"model_config__is_encoder_decoder": True},
    "fast prefill": {"cache_config__kv_sharing_fast_prefill": True},
}


def assert_stays_any(bus: Any, embeddings: list[Embedding]) -> None:
    for embedding in embeddings:
        assert not embedding._forward_pre_hooks
        embedding(torch.tensor([7, 9, 1]))
    assert bus.buffer.tolist() == [NAMES["any"]] * CAPACITY


@pytest.mark.parametrize("reason", list(REASONS))
def test_what_the_hook_cannot_see_keeps_any(monkeypatch: pytest.MonkeyPatch, messages: list[str], reason: str) -> None:
    from vllm.logger import _print_info_once

    _print_info_once.cache_clear()
    bus, embeddings = started(monkeypatch, **REASONS[reason])
    assert_stays_any(bus, embeddings)
    (line,) = messages
    assert line.startswith("MorphoQuant: row 'any' quantizes the tokens of every modality (") and reason in line


@pytest.mark.parametrize(
    ("ids", "embeddings", "reason"),
    [
        ({}, 1, "the checkpoint names no placeholder tokens"),
        ({"image": (7,), "audio": (9,)}, 0, "the model has 0 token embeddings"),
        ({"image": (7,), "audio": (9,)}, 2, "the model has 2 token embeddings"),
        (
            {"image": (7,), "audio": (VOCABULARY,)},
            1,
            f"placeholder token {VOCABULARY} is outside the vocabulary of",
        ),
        # An InternVL's: its config names the image token only, and vLLM gives videos another.
        ({"image": (7,)}, 1, "the token table does not list the tokens of audio"),
    ],
)
def test_tables_and_models_that_leave_doubt_keep_any(
    monkeypatch: pytest.MonkeyPatch,
    messages: list[str],
    ids: dict[str, tuple[int, ...]],
    embeddings: int,
    reason: str,
) -> None:
    from vllm.logger import _print_info_once

    _print_info_once.cache_clear()
    spec = QuantizationSpec(layers=SPEC.layers, placeholder_token_ids=ids)
    bus, made = started(monkeypatch, spec, embeddings)
    assert_stays_any(bus, made)
    (line,) = messages
    assert f"({reason}" in line


def test_a_medium_that_the_engine_does_not_take_needs_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantizationSpec(layers=SPEC.layers, placeholder_token_ids={"image": (7,)})
    bus, (embedding,) = started(monkeypatch, spec, taken=("image",))
    embedding(torch.tensor([7, 9]))
    assert bus.buffer.tolist()[:2] == [NAMES["image"], NAMES["text"]]


def test_vllms_configuration_has_the_settings_that_decide() -> None:
    from vllm.config import VllmConfig

    from morphoquant_vllm.plugin.modality_bus import off_reason

    # Without a model every one of them is read, and the reason is the missing model.
    assert off_reason(VllmConfig()) == "the engine takes no media"


def test_every_tensor_of_the_bus_is_a_buffer_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's sleep at level 2 keeps the buffers of a model, and drops all else that was made while it was loaded."""
    from morphoquant_vllm.plugin.modality_bus import TABLE, table_of

    bus, (embedding,) = started(monkeypatch)
    assert bus.buffer is not None
    held = {buffer.data_ptr() for buffer in embedding.buffers()}
    # The layers that read the buffer register it.
    others = [value for value in vars(bus).values() if isinstance(value, torch.Tensor) and value is not bus.buffer]
    assert not others and table_of(embedding).data_ptr() in held
    assert TABLE not in embedding.state_dict()


@pytest.mark.parametrize("passed", [True, False])
def test_a_drafts_embedding_has_no_part_in_the_bus(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    # vLLM builds a draft after the model, with the model's quantization config.
    bus, (embedding,) = started(monkeypatch)
    draft = Embedding(VOCABULARY, 4)
    bus.attach(draft, passed=passed)
    embedding(torch.tensor([7, 1]))
    before = bus.buffer.clone()
    draft(torch.tensor([9]))
    assert torch.equal(bus.buffer, before)
