"""Counting in vLLM's layers: the chosen layers and steps, equal to the torch reference, and the worker's step."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from morphoquant_vllm import ops
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics.activation import act_quant, escapes, is_massive, token_rows
from morphoquant_vllm.numerics.escape_counts import COLUMNS
from morphoquant_vllm.plugin.additional_config import Watch
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from morphoquant_vllm.plugin.escape_watch import EscapeWatch, choose_layers, refuse_partial_steps
from tests.checkpoints import random_group
from tests.records import activation_of

K, N, G = 64, 32, 32
NAMES = ("one.o_proj", "two.o_proj")


@pytest.fixture
def watched(engine_context: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """vLLM's configuration that counts every second step, with this plugin's as its quantization."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    monkeypatch.setattr(WorkerWrapperBase, "execute_model", WorkerWrapperBase.execute_model)
    layers = {name: LayerSpec(K, N, G, "row", name) for name in NAMES}
    layers["tower"] = LayerSpec(K, N, G, "row", "tower", fixed_row="image")
    quantization = MorphoQuantConfig(QuantizationSpec(layers=layers))
    config = VllmConfig(additional_config={"morphoquant": {"watch_escapes": {"every": 2, "layers": 9, "seconds": 60}}})
    with set_current_vllm_config(config):
        yield quantization, config


def make(quantization: MorphoQuantConfig, name: str) -> torch.nn.Module:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(K, N, bias=False, quant_config=quantization, prefix=name)


def load(layer: torch.nn.Module, spec: QuantizationSpec, seed: int) -> dict[str, Tensor]:
    matrix = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    (tensors,) = random_group([matrix], next(iter(spec.layers.values())), spec, torch.tensor(seed))
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return tensors


def expected_counts(x: Tensor, modality: Tensor, tensors: dict[str, Tensor], rows: int) -> Tensor:
    record = activation_of(tensors)
    escaped = escapes(act_quant(x, token_rows(x, modality, record), record)).sum(1)
    massive = is_massive(x, record.massive_channel, record.massive_low, record.massive_high)
    counts = torch.zeros(rows, len(COLUMNS), dtype=torch.int64)
    for token, row in enumerate(modality.tolist()):
        heavy = int(massive[token])
        counts[row] += torch.tensor([1, int(escaped[token]), heavy, heavy * int(escaped[token])])
    return counts


def test_every_second_step_of_requests_is_counted_as_the_reference_counts(watched: tuple[Any, Any]) -> None:
    quantization, _ = watched
    layers = [make(quantization, name) for name in NAMES]
    tensors = [load(layer, quantization.spec, 5 + index) for index, layer in enumerate(layers)]
    watch: EscapeWatch = quantization.escape_watch
    rows = len(quantization.spec.rows)
    modality = torch.arange(20, dtype=torch.int32) % (rows - 1)
    layers[0].modality[:20] = modality
    assert layers[0].modality is layers[1].modality
    expected = torch.zeros_like(watch.counts)
    for number in range(4):
        x = torch.randn(20, K, generator=torch.Generator().manual_seed(number)) * 2
        plain = [layer(x)[0] for layer in layers]  # a step of vLLM's own, as its warm-up: counts nothing
        live = 20 - 3 * number  # the rest is padding
        with watch.step(live):
            assert all(torch.equal(layer(x)[0], y) for layer, y in zip(layers, plain, strict=True))
        if number % 2 == 0:
            for index, stored in enumerate(tensors):
                expected[index] += expected_counts(x[:live], modality[:live], stored, rows)
    assert int(expected[..., COLUMNS.index("massive_escapes")].sum()) > 0
    assert torch.equal(watch.counts, expected)
    assert torch.equal(watch.copied, expected)
    assert watch.channels.tolist() == [K, K]


def test_fused_ops_count_the_input_that_they_compute(watched: tuple[Any, Any]) -> None:
    quantization, _ = watched
    layer = make(quantization, NAMES[0])
    tensors = load(layer, quantization.spec, 5)
    watch, handle = quantization.escape_watch, layer.quant_method.handle(layer)
    generator = torch.Generator().manual_seed(1)
    gate_up, x = torch.randn(6, 2 * K, generator=generator) * 3, torch.randn(6, K, generator=generator)
    weight, residual = torch.rand(K, generator=generator) * 3, torch.randn(6, K, generator=generator)
    with watch.step(6):
        ops.bound_silu_mul_linear(gate_up, layer.modality, handle, None)
        ops.rms_norm_linear(x, weight, 1e-6, layer.modality, handle, None)
        ops.add_rms_norm_linear(x, residual, weight, 1e-6, layer.modality, handle, None)
    gate, up = gate_up.chunk(2, 1)
    inputs = [torch.nn.functional.silu(gate) * up]
    inputs += [torch.nn.functional.rms_norm(h, (K,), weight, 1e-6) for h in (x, x + residual)]
    rows, modality = len(quantization.spec.rows), layer.modality[:6]
    expected = sum(expected_counts(value, modality, tensors, rows) for value in inputs)
    assert torch.equal(watch.counts[0], expected)


def test_a_worker_counts_its_steps_through_its_models_watch(
    watched: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    quantization, config = watched
    layer = make(quantization, NAMES[0])
    make(quantization, NAMES[1])
    load(layer, quantization.spec, 5)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(2))
    worker = WorkerWrapperBase()
    worker.vllm_config = config
    worker.worker = SimpleNamespace(execute_model=lambda output: layer(x)[0])
    worker.mm_receiver_cache = None
    scheduled = SimpleNamespace(total_num_scheduled_tokens=5, scheduled_new_reqs=[])
    plain = worker.execute_model(scheduled)
    assert not quantization.escape_watch.counts.any(), "the configuration is another model's"
    monkeypatch.setattr(config, "quant_config", quantization)
    for _ in range(3):
        assert torch.equal(worker.execute_model(scheduled), plain)
    assert int(quantization.escape_watch.counts[..., 0].sum()) == 10, "the first and the third step, of five tokens"
    assert quantization.escape_watch.row_counts()["any"].tokens == 10


def test_towers_and_draft_models_are_not_counted(watched: tuple[Any, Any]) -> None:
    quantization, _ = watched
    for name in ("tower", f"draft_model.{NAMES[0]}"):
        assert make(quantization, name).quant_method.watch is None
    assert quantization.escape_watch is None


def test_without_the_setting_layers_are_bound_as_they_are(engine_context: None) -> None:
    quantization = MorphoQuantConfig(QuantizationSpec(layers={NAMES[0]: LayerSpec(K, N, G, "row", NAMES[0])}))
    layer = make(quantization, NAMES[0])
    load(layer, quantization.spec, 5)
    assert layer.quant_method.watch is None and quantization.escape_watch is None


@pytest.mark.parametrize(("rank", "split", "counts"), [(0, False, True), (1, False, False), (1, True, True)])
def test_an_input_that_all_ranks_have_is_counted_once(rank: int, split: bool, counts: bool) -> None:
    spec = QuantizationSpec(layers={NAMES[0]: LayerSpec(K, N, G, "row", NAMES[0])})
    (tensors,) = random_group([torch.randn(N, K)], spec.layers[NAMES[0]], spec, torch.tensor(1))
    watch = EscapeWatch(Watch(), spec.rows, None, None)
    watch.add(NAMES[0], NAMES[0], K)
    counter = watch.counter(
        NAMES[0], rank, split=split, backend="reference", prepared=[], record=activation_of(tensors)
    )
    assert (counter is not None) is counts


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(3, 8, [0, 1, 2]), (8, 8, [*range(8)]), (96, 4, [0, 25, 50, 75]), (10, 3, [0, 4, 8]), (1, 1, [0])],
)
def test_chosen_layers_are_spread_and_of_all_kinds(count: int, wanted: int, chosen: list[int]) -> None:
    assert choose_layers(count, wanted) == chosen


def test_every_choice_has_as_many_layers_as_wanted() -> None:
    for count in range(1, 40):
        for wanted in range(1, 45):
            chosen = choose_layers(count, wanted)
            assert chosen == sorted(set(chosen)) and len(chosen) == min(wanted, count) and chosen[-1] < count


def test_an_engine_that_splits_steps_is_refused_in_one_line() -> None:
    def engine(ubatching: bool, context: int, fast: bool, experts: bool = False) -> Any:
        parallel = SimpleNamespace(
            use_ubatching=ubatching, prefill_context_parallel_size=context, use_sequence_parallel_moe=experts
        )
        return SimpleNamespace(parallel_config=parallel, cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast))

    refuse_partial_steps(engine(False, 1, False))
    for settings, reason in (
        ((True, 1, False), "microbatching"),
        ((False, 2, False), "context parallelism"),
        ((False, 1, False, True), "sequence-parallel experts"),
        ((False, 1, True), "fast prefill"),
    ):
        with pytest.raises(MorphoQuantError, match=f"watch_escapes does not count with {reason}"):
            refuse_partial_steps(engine(*settings))
