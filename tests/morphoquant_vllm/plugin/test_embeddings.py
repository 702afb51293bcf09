"""The class that stands for vLLM's embedding: it shows its tokens to a bus in models of this method alone."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec

SPEC = QuantizationSpec(
    layers={"a": LayerSpec(64, 32, 32, "column", "a")}, placeholder_token_ids={"image": (7,), "audio": (9,)}
)


@pytest.fixture
def registry() -> Iterator[dict[str, type]]:
    """vLLM's registry of replaced layers, empty; it is as before after the test."""
    from vllm.model_executor.custom_op import op_registry_oot

    before = dict(op_registry_oot)
    op_registry_oot.pop("VocabParallelEmbedding", None)
    yield op_registry_oot
    op_registry_oot.clear()
    op_registry_oot.update(before)


def build(monkeypatch: pytest.MonkeyPatch, engine_method: Any, own_method: Any = None) -> torch.nn.Module:
    """vLLM's embedding as a model class builds it, in an engine with the quantization config `engine_method`."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from morphoquant_vllm.plugin import embeddings

    monkeypatch.setattr(
        embeddings, "get_current_vllm_config_or_none", lambda: SimpleNamespace(quant_config=engine_method)
    )
    layer: torch.nn.Module = VocabParallelEmbedding(16, 32, quant_config=own_method, disable_tp=True)
    return layer


def test_an_embedding_without_a_config_of_its_own_fills_the_bus(
    monkeypatch: pytest.MonkeyPatch, registry: dict[str, type]
) -> None:
    from morphoquant_vllm.plugin import modality_bus
    from morphoquant_vllm.plugin.config import MorphoQuantConfig
    from morphoquant_vllm.plugin.embeddings import ObservedEmbedding

    config = MorphoQuantConfig(SPEC)
    assert registry["VocabParallelEmbedding"] is ObservedEmbedding
    layer = build(monkeypatch, config)
    assert type(layer) is ObservedEmbedding
    bus = config.modality_bus()
    engine = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=4))
    monkeypatch.setattr(modality_bus, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(bus, "_off_reason", lambda _: None)
    buffer = bus.rows(torch.device("cpu"))
    layer(torch.tensor([7, 1, 9]))
    assert [SPEC.rows[row] for row in buffer.tolist()] == ["image", "text", "audio", "any"]


def test_an_embedding_with_a_config_of_its_own_is_preferred(
    monkeypatch: pytest.MonkeyPatch, registry: dict[str, type]
) -> None:
    from morphoquant_vllm.plugin.config import MorphoQuantConfig

    config = MorphoQuantConfig(SPEC)
    other, own = build(monkeypatch, config), build(monkeypatch, config, own_method=config)
    bus = config.modality_bus()
    assert [layer for layer, _ in bus._configured] == [own]
    assert [layer for layer, _ in bus._unconfigured] == [other]


def test_models_of_other_methods_are_left_alone(monkeypatch: pytest.MonkeyPatch, registry: dict[str, type]) -> None:
    from morphoquant_vllm.plugin.embeddings import replace_embedding

    replace_embedding()
    for engine in (None, SimpleNamespace(get_name=lambda: "fp8")):
        assert not build(monkeypatch, engine)._forward_pre_hooks


def test_another_plugins_embedding_stays(monkeypatch: pytest.MonkeyPatch, registry: dict[str, type]) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from morphoquant_vllm.plugin.config import MorphoQuantConfig

    class Other(VocabParallelEmbedding):
        pass

    registry["VocabParallelEmbedding"] = Other
    config = MorphoQuantConfig(SPEC)
    assert type(build(monkeypatch, config)) is Other
    assert registry["VocabParallelEmbedding"] is Other
    assert not config.modality_bus()._unconfigured
