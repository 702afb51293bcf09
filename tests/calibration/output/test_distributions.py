"""The kept distribution of each input."""

from pathlib import Path

import pytest
import torch

from calibration.output.distributions import (
    DISTRIBUTIONS_FILE,
    EVENLY_SPACED,
    MOST_DISPERSED,
    kept_channels,
    observe,
    read_distributions,
    write_distributions,
)
from calibration.quantize.layer import quantize_input
from calibration.settings.recipe import Recipe
from morphoquant_vllm.errors import MorphoQuantError
from tests.calibration.inputs import AUDIO, K, make_spec, matrix, with_massive
from tests.calibration.inputs import observe as collect

SHARDS = {"m.q": matrix()}
SPEC = make_spec(SHARDS)


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, torch.Tensor], dict[str, float], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The record, the escape rates that calibration reports, and the input with its modality and massive tokens."""
    x, modality, outlying = with_massive()
    sample, tokens = collect(x, modality, 1.0, outlying, x)
    layer = quantize_input(sample, tokens, SHARDS, SPEC, Recipe())["m.q"]
    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    record = observe(sample, tokens, layer.tensors, SPEC)
    assert all(torch.equal(layer.tensors[name], tensor) for name, tensor in before.items())
    return record, layer.figures.escape_rate, x, modality, outlying


def test_ranges_are_those_of_the_tokens(recorded: tuple) -> None:
    record, _, x, modality, outlying = recorded
    assert record["channels"].tolist() == list(range(K)), "few enough channels to keep all"
    for row, own in (("text", (modality == 0) & ~outlying), ("audio", (modality == AUDIO) & ~outlying)):
        # bfloat16 has 8 significant bits.
        near = {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(record[f"{row}.minimum"].float(), x[own].amin(0), **near)
        torch.testing.assert_close(record[f"{row}.maximum"].float(), x[own].amax(0), **near)
        low, high = torch.quantile(x[own], torch.tensor([0.01, 0.99]), dim=0)
        torch.testing.assert_close(record[f"{row}.low"].float(), low, **near)
        torch.testing.assert_close(record[f"{row}.high"].float(), high, **near)
    assert float(record["massive.maximum"].max()) > 250
    assert float(record["text.maximum"].max()) < 250, "massive tokens stand apart"


def test_codes_tell_the_escape_rate_that_calibration_reports(recorded: tuple) -> None:
    record, rates, x, _, outlying = recorded
    total = sum(record[f"{row}.codes"] for row in ("text", "audio", "massive"))
    assert int(total.sum()) == x.numel()
    codes = torch.arange(-128, 128)
    outside = int(total[(codes < -8) | (codes > 7)].sum())
    assert outside / x.numel() == pytest.approx(rates["all"], rel=1e-5)
    massive = record["massive.codes"]
    assert int(massive.sum()) == int(outlying.sum()) * K
    assert int(massive[(codes < -8) | (codes > 7)].sum()) / int(massive.sum()) == pytest.approx(rates["massive"])


def test_dispersion_is_high_where_tails_are_long(recorded: tuple) -> None:
    record = recorded[0]
    assert int(record["text.dispersion"].float().argmax()) == 5
    assert int(record["audio.dispersion"].float().argmax()) == 9


def test_a_wide_input_keeps_its_most_dispersed_channels_and_a_few_of_all() -> None:
    dispersion = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    dispersion[4321] = 50.0
    kept = kept_channels(dispersion)
    assert MOST_DISPERSED < kept.numel() <= MOST_DISPERSED + EVENLY_SPACED
    assert 4321 in kept and 0 in kept and 9_999 in kept
    assert torch.equal(kept, kept.sort().values.unique())


def test_the_file_gives_back_what_was_written(recorded: tuple, tmp_path: Path) -> None:
    assert read_distributions(tmp_path, SPEC) == {}
    write_distributions(tmp_path, {"m.fused": recorded[0]})
    found = read_distributions(tmp_path, SPEC)
    assert found.keys() == {"m.fused"} and found["m.fused"].keys() == recorded[0].keys()
    assert all(torch.equal(found["m.fused"][name], tensor) for name, tensor in recorded[0].items())
    assert not list(tmp_path.glob("*.safetensors")), "loaders would take it for weights"


def test_a_damaged_file_is_named(recorded: tuple, tmp_path: Path) -> None:
    write_distributions(tmp_path, {"m.fused": recorded[0]})
    path = tmp_path / DISTRIBUTIONS_FILE
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(MorphoQuantError, match="truncated or not safetensors"):
        read_distributions(tmp_path, SPEC)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", None),
        ("channels", torch.arange(4)),
        ("channels", torch.empty(0, dtype=torch.int32)),
        ("channels", torch.tensor([[0, 1]], dtype=torch.int32)),
        ("channels", torch.tensor(3, dtype=torch.int32)),
        ("channels", torch.tensor([0, 1, 2, K], dtype=torch.int32)),
        ("channels", torch.tensor([1, 0, 2, 3], dtype=torch.int32)),
        ("text.minimum", None),
        ("text.minimum", torch.full((4,), torch.nan).bfloat16()),
        ("text.low", torch.zeros(3).bfloat16()),
        ("text.dispersion", None),
        ("text.dispersion", torch.zeros(K - 1).bfloat16()),
        ("text.dispersion", torch.zeros(K)),
        ("text.codes", torch.full((256,), -1)),
        ("text.codes", torch.full((256,), 2**60)),
        ("text.codes", torch.zeros(256)),
    ],
    ids=str,
)
def test_a_damaged_record_is_refused_by_name(key: str, value: torch.Tensor | None, tmp_path: Path) -> None:
    record = {
        "channels": torch.arange(4, dtype=torch.int32),
        **{f"text.{kind}": torch.zeros(4).bfloat16() for kind in ("minimum", "maximum", "low", "high")},
        "text.dispersion": torch.zeros(K).bfloat16(),
        "text.codes": torch.zeros(256, dtype=torch.int64),
    }
    name = next(iter(SPEC.shared_inputs()))
    write_distributions(tmp_path, {name: record})
    assert read_distributions(tmp_path, SPEC)[name].keys() == record.keys()
    damaged = {entry: tensor for entry, tensor in {**record, key: value}.items() if tensor is not None}
    write_distributions(tmp_path, {name: damaged})
    with pytest.raises(MorphoQuantError, match=rf"{DISTRIBUTIONS_FILE}: {name}.*{key.split('.')[-1]}.*calibrate again"):
        read_distributions(tmp_path, SPEC)
