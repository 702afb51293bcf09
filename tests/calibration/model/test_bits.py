"""Spending a budget of bits: sizes, the range of budgets, and the greedy choice."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.model.bits import (
    Candidate,
    apply,
    check_bits_budget,
    extra_bytes,
    in_form,
    mean_bits,
    spend,
    stored_bits,
)
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import LayerSpec, tensor_specs
from morphoquant_vllm.format.schema import QuantizationSpec
from tests.checkpoints import layer_specs

SPEC = QuantizationSpec(layers=layer_specs(2))
BITS = {4: 4.5, 8: 8.5, 16: 16.0}
PREFIX = "model.layers"


@pytest.mark.parametrize("scheme", ["group", "two_level"])
@pytest.mark.parametrize("form", [4, 8])
def test_the_bits_of_a_weight_are_those_of_its_stored_tensors(scheme: str, form: int) -> None:
    layer = in_form(LayerSpec(128, 48, 32, "column", "a", scale_scheme=scheme), form)
    assert layer is not None
    stored = sum(
        8 * tensor.dtype.itemsize * math.prod(tensor.shape)
        for name, tensor in tensor_specs(layer, 6, 1).items()
        if name.startswith("weight_")
    )
    assert stored_bits(layer) == stored / (128 * 48)
    assert stored_bits(None) == 16


def test_an_impossible_budget_is_refused_with_the_range() -> None:
    check_bits_budget(SPEC, PREFIX, Recipe())
    check_bits_budget(SPEC, PREFIX, Recipe(bits_budget=4.5))
    check_bits_budget(SPEC, PREFIX, Recipe(bits_budget=8))
    for budget in (4.4, 8.1, -1, 0):
        with pytest.raises(MorphoQuantError, match=rf"^bits_budget = {budget:g}: must be 4\.500 to 8, ") as caught:
            check_bits_budget(SPEC, PREFIX, Recipe(bits_budget=budget))
        assert "\n" not in str(caught.value)


def test_a_budget_may_add_its_bytes() -> None:
    weights = sum(layer.in_features * layer.out_features for layer in SPEC.layers.values())
    assert extra_bytes(SPEC, PREFIX, Recipe()) == 0
    assert extra_bytes(SPEC, PREFIX, Recipe(bits_budget=5.5)) == weights // 8


def test_bits_go_where_one_lowers_the_loss_most() -> None:
    candidates = {
        "small": Candidate(100, BITS, {4: 5.0, 8: 1.0, 16: 0.9}),
        "large": Candidate(400, BITS, {4: 9.0, 8: 5.0, 16: 0.0}),
        "useless": Candidate(100, BITS, {4: 1.0, 8: 1.0, 16: 1.0}),
    }
    # small: 4 / 400 a bit to 8 bits. large: 4 / 1600 to 8 bits, but 9 / 4600 to 16: then 5 / 3000.
    assert spend(candidates, 0) == {"small": 4, "large": 4, "useless": 4}
    assert spend(candidates, 399) == {"small": 4, "large": 4, "useless": 4}
    assert spend(candidates, 400) == {"small": 8, "large": 4, "useless": 4}
    assert spend(candidates, 2000) == {"small": 8, "large": 8, "useless": 4}
    assert spend(candidates, 5000) == {"small": 8, "large": 16, "useless": 4}
    assert spend(candidates, 1e9) == {"small": 16, "large": 16, "useless": 4}


def test_a_form_that_eight_bits_do_not_help_goes_to_sixteen_at_once() -> None:
    """The error of its activations is what costs."""
    candidates = {"a": Candidate(100, BITS, {4: 9.0, 8: 8.9, 16: 0.0})}
    assert spend(candidates, 1149) == {"a": 4}
    assert spend(candidates, 1150) == {"a": 16}


def test_equal_inputs_take_their_turn_in_order() -> None:
    same = {name: Candidate(10, BITS, {4: 2.0, 8: 1.0, 16: 0.9}) for name in "cab"}
    assert spend(same, 80) == {"c": 8, "a": 8, "b": 4}


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.tuples(*(st.floats(0, 10) for _ in range(3))), min_size=1, max_size=4),
    spare=st.floats(0, 5000),
)
def test_a_choice_keeps_the_budget_and_is_near_the_best(losses: list[tuple[float, float, float]], spare: float) -> None:
    candidates = {
        str(index): Candidate(100 * (index + 1), BITS, dict(zip((4, 8, 16), sorted(loss)[::-1], strict=True)))
        for index, loss in enumerate(losses)
    }

    def cost(forms: tuple[int, ...]) -> float:
        pairs = zip(candidates.values(), forms, strict=True)
        return sum(entry.weights * (BITS[form] - BITS[4]) for entry, form in pairs)

    def loss(forms: tuple[int, ...]) -> float:
        return sum(entry.loss[form] for entry, form in zip(candidates.values(), forms, strict=True))

    chosen = tuple(spend(candidates, spare).values())
    assert cost(chosen) <= spare + 1e-6
    best = min(loss(forms) for forms in itertools.product((4, 8, 16), repeat=len(losses)) if cost(forms) <= spare)
    # A greedy choice over convex steps misses at most one step.
    largest = max(entry.loss[4] - entry.loss[16] for entry in candidates.values())
    assert loss(chosen) <= best + largest + 1e-9


def test_forms_of_inputs_become_settings_of_linears() -> None:
    forms = {"model.layers.0.self_attn.qkv_proj": 8, "model.layers.1.mlp.down_proj": 16}
    spec = apply(SPEC, forms)
    assert SPEC.layers.keys() - spec.layers.keys() == {"model.layers.1.mlp.down_proj"}
    wide = [name for name, layer in spec.layers.items() if layer.weight_bits == 8]
    assert wide == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    assert mean_bits(SPEC.layers.values()) == 4.5 < mean_bits(spec.layers.values()) < 8.5
