"""Learning a checkpoint end to end, on a tiny model."""

from pathlib import Path

import pytest
import torch

from benchmarks.end_to_end.__main__ import parser
from benchmarks.end_to_end.evaluate import escape_rate, losses, perplexities, ratio
from benchmarks.end_to_end.learn import Learner, Rates, last_states
from benchmarks.end_to_end.report import markdown
from benchmarks.end_to_end.student import Product, StudentInput, StudentLinear, load_student
from benchmarks.models import decoder
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, LayerSpec
from morphoquant_vllm.format.schema import DEFAULT_ROWS, QuantizationSpec
from morphoquant_vllm.hf import MorphoQuantLinear, configure
from morphoquant_vllm.hf.linear import Mode
from tests.calibration.built_models import TinyModels
from tests.checkpoints import random_group

TOKENS = 64


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("end-to-end")
    source = TinyModels(folder / "source").model("llama")
    recipe = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False)
    calibrate(source, TinyModels(folder / "data").data("llama"), folder / "quantized", recipe=recipe)
    return source, folder / "quantized"


def windows(count: int) -> list[list[int]]:
    drawn = torch.randint(20, 60, (count, TOKENS), generator=torch.Generator().manual_seed(0))
    found: list[list[int]] = drawn.tolist()
    return found


def learner(directories: tuple[Path, Path]) -> Learner:
    teacher = decoder.load(directories[0])
    with torch.no_grad():
        states = [last_states(teacher, window) for window in windows(2)]
    return Learner(*load_student(directories[1]), windows(2), states)


@pytest.mark.slow
def test_the_student_begins_as_the_served_checkpoint(directories: tuple[Path, Path]) -> None:
    reference = decoder.load(directories[1])
    configure(reference, reference=True)
    student, inputs = load_student(directories[1])
    with torch.no_grad():
        wanted, found = (last_states(model, windows(1)[0]) for model in (reference, student))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    # The shards of an input share its quantizer.
    assert len(inputs) == 2 * 4
    assert 0 <= escape_rate(inputs) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("rates", [Rates(3e-3, 0.0), Rates(1e-3, 0.01)])
def test_the_divergence_falls_as_the_student_learns(directories: tuple[Path, Path], rates: Rates) -> None:
    own = learner(directories)
    with torch.no_grad():
        before = sum(float(own.divergence(window)) for window in range(2))
    assert len(list(own.epochs(rates, 12))) == 12
    with torch.no_grad():
        after = sum(float(own.divergence(window)) for window in range(2))
    assert after < 0.9 * before
    # Weights are fixed without a rate, and their codes stay whole.
    assert (own.changed_codes() > 0) == (rates.weights > 0)


@pytest.mark.slow
def test_a_model_without_quantized_linears_is_refused(directories: tuple[Path, Path]) -> None:
    with pytest.raises(MorphoQuantError, match=r"cannot learn .*no quantized linear"):
        load_student(directories[0])


@pytest.mark.parametrize("scheme", [GROUP_SCHEME, TWO_LEVEL_SCHEME])
def test_a_linear_of_the_student_computes_as_the_reference(scheme: str) -> None:
    layer = LayerSpec(64, 32, 32, "row", "layer", bias=True, scale_scheme=scheme)
    spec = QuantizationSpec({"layer": layer}, DEFAULT_ROWS, 2, {}, "tests")
    linear = MorphoQuantLinear("layer", layer, spec, Mode(spec.any_row, reference=True))
    generator = torch.Generator().manual_seed(0)
    made = random_group([torch.randn(32, 64, generator=generator)], layer, spec, torch.tensor(1))[0]
    linear.load_state_dict({**made, "bias": torch.randn(32, generator=generator)})
    x = 3 * torch.randn(1, 200, 64, generator=generator)
    given = StudentInput(linear)
    with torch.no_grad():
        found, wanted = StudentLinear(linear, given, generator)(x), linear(x)
    # Both rows serve tokens, and some codes escape.
    assert 0 < given(x)[1].numel() < 200 and given.escaped
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_gradient_of_weights_passes_their_rounding_but_not_the_limits() -> None:
    latent = torch.tensor([[0.4, -3.3], [7.6, 0.0]], requires_grad=True)
    levels = torch.tensor([[2.0], [3.0]])
    codes = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = Product.apply(codes, latent, levels)
    # q is 0, -3, 7 and 0.
    assert y.tolist() == [[-12.0, 21.0]]
    y.sum().backward()
    assert latent.grad is not None and latent.grad.tolist() == [[2.0, 4.0], [0.0, 6.0]]
    assert codes.grad is not None and codes.grad.tolist() == [[21.0, -6.0]]


def test_the_ratio_of_perplexities_has_the_error_of_its_windows() -> None:
    found, other = {"a": [2.0, 4.0], "b": [6.0]}, {"a": [1.0, 3.0], "b": [4.0]}
    value, error = ratio(found, other, 2)
    assert value == pytest.approx(3.7937, rel=1e-4)
    assert error == pytest.approx(value / 3, rel=1e-4)
    assert perplexities({"a": [0.0, 0.0]}, 2) == {"a": 1.0}


def test_the_table_has_a_line_for_each_epoch() -> None:
    row = {"epoch": 0, "perplexity": {"a": 12.0}, "over_16bit": (1.2, 0.01), "over_start": (1.0, 0.0)}
    row |= {"divergence": 0.1, "changed_codes": 0.0, "escapes": 0.04, "cpu_seconds": 0.0}
    result = {
        "command": "python -m benchmarks.end_to_end A B",
        "machine": "A",
        "model": "A",
        "tokens": 128,
        "held_out_tokens": 64,
        "exact": {"perplexity": {"a": 10.0}},
        "rows": [row, {**row, "epoch": 1, "changed_codes": 0.02}],
    }
    text = markdown(result)
    assert "| epoch 1 | 12.00 | 1.2000 ± 0.0100 | 1.0000 ± 0.0000 | 0.1000 | 2.00% | 4.00% | 0 |" in text
    assert parser().parse_args(["A", "B"]).results == Path("benchmarks/results/end_to_end")


@pytest.mark.slow
def test_losses_are_those_of_the_next_token(directories: tuple[Path, Path]) -> None:
    model = decoder.load(directories[0])
    window = windows(1)[0]
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([window]), labels=torch.tensor([window])).loss
    assert losses(model, {"a": [window]})["a"][0] == pytest.approx(float(mean) * (TOKENS - 1), rel=1e-4)
    assert not any(isinstance(module, StudentLinear) for module in model.modules())
