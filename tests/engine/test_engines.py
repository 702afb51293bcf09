"""vLLM engines over a calibrated tiny Qwen2.5-Omni: the values in its layers, in each mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.activation import act_quant, escapes, token_rows
from tests.engine.agreement import assert_same_logprobs
from tests.engine.conftest import TEXT_PROMPT, Engines
from tests.engine.layers import assert_layers_are_the_reference, captured_layers, seen, stored_shards
from tests.records import activation_of, weight_of
from tests.reference_model import Checkpoint

pytestmark = pytest.mark.slow

# float32 sums in another order, as the issue allows between engines; logits of the tiny model are of size 10.
SAME_NUMERICS = 1e-3
# Name of a layer in vLLM's Qwen2.5-Omni, and in the checkpoint.
STORED_PREFIX = ("language_model.model.", "thinker.model.")


def request_logprobs(result: dict[str, Any]) -> Tensor:
    return torch.tensor([value for request in result["requests"] for value in request["prompt_logprobs"]])


@pytest.mark.parametrize(("job", "dtype"), [("eager", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_codes_and_outputs_inside_the_layers_equal_the_reference(
    engines: Engines, checkpoint: Checkpoint, job: str, dtype: str
) -> None:
    assert_layers_are_the_reference(engines.results[job], checkpoint, getattr(torch, dtype), STORED_PREFIX)


def test_the_input_of_every_down_proj_comes_in_its_channel_order(engines: Engines) -> None:
    """That inputs and outputs are in that order is what the tests of layers before and after this one rest on."""
    result = engines.results["eager"]
    for layer in captured_layers(result):
        renumbered = bool(result["captured"][f"{layer}.renumbered"])
        assert renumbered == layer.endswith(("mlp.gate_up_proj", "mlp.down_proj")), layer


def test_activations_really_are_four_bit(engines: Engines, checkpoint: Checkpoint) -> None:
    result = engines.results["bfloat16"]
    for layer in captured_layers(result):
        x, codes, y = seen(result, layer, checkpoint, STORED_PREFIX)
        shards = [checkpoint.layer(name) for name in stored_shards(layer, STORED_PREFIX)]
        activation, weight = activation_of(shards[0]), weight_of(*shards)
        # On a prompt that calibration did not see; the budget there is 4 %, and the bar of a layer 20 %.
        assert float(escapes(codes).float().mean()) < 0.2, layer
        assert int(codes.unique().numel()) > 8, "a layer that sees real input uses more than half its grid"
        # The same weights under 16-bit activations: undo absorption and channel order.
        matrix = torch.empty(y.shape[1], x.shape[1])
        matrix[:, activation.channel_order.long()] = weight.dequantized()
        bias = torch.cat([shard["bias"] for shard in shards]) if "bias" in shards[0] else 0.0
        weight_only = x.float() @ (matrix / shards[0]["activation_step"]).T + bias
        relative = (y.float() - weight_only).norm() / weight_only.norm()
        # A 4-bit grid costs percents; bfloat16 rounding alone would cost 0.2 %.
        assert 0.01 < float(relative) < 1, (layer, float(relative))


@pytest.mark.parametrize("job", ["eager", "bfloat16"])
def test_counted_escapes_are_those_of_the_reference(engines: Engines, checkpoint: Checkpoint, job: str) -> None:
    result = engines.results[job]
    layers = captured_layers(result)
    assert len(result["counted"]) == len(layers)
    for layer in layers:
        x, modality = seen(result, layer, checkpoint, STORED_PREFIX)[0], result["captured"][f"{layer}.modality"]
        first = stored_shards(layer, STORED_PREFIX)[0]
        activation = activation_of(checkpoint.layer(first))
        massive = token_rows(x, modality, activation) == len(checkpoint.spec.rows) - 1
        escaped = escapes(act_quant(x, token_rows(x, modality, activation), activation)).sum(1)
        columns = torch.stack((torch.ones_like(escaped), escaped, massive, escaped * massive), 1)
        expected = [columns[modality == row].sum(0).tolist() for row in range(len(checkpoint.spec.rows))]
        assert result["counted"][first] == expected, layer
    totals = torch.tensor([*result["counted"].values()]).sum(0)
    for row in ("text", "image", "audio"):
        tokens, escaped, *_ = totals[checkpoint.spec.rows.index(row)].tolist()
        assert escaped > 0 and len(layers) * 10 < tokens, row


def test_a_compiled_engine_counts_as_an_eager_one(engines: Engines) -> None:
    eager, compiled = (torch.tensor([*engines.results[job]["counted"].values()]) for job in ("eager", "compiled"))
    assert torch.equal(eager[..., 0], compiled[..., 0]), "tokens of each row"
    # The compiler adds up in another order, so a value at the border of two codes may fall into the other one.
    torch.testing.assert_close(compiled.double(), eager.double(), rtol=0.01, atol=2)


def test_compiled_equals_eager(engines: Engines) -> None:
    eager, compiled = engines.results["eager"], engines.results["compiled"]
    assert eager["compilation"] == "NONE"
    assert compiled["compilation"] != "NONE"
    assert_same_logprobs(request_logprobs(compiled), request_logprobs(eager))
    assert [r["token_ids"] for r in compiled["requests"]] == [r["token_ids"] for r in eager["requests"]]


def test_two_ranks_equal_one(engines: Engines) -> None:
    one, two = engines.results["eager"], engines.results["tp2"]
    assert_same_logprobs(request_logprobs(two), request_logprobs(one))
    assert [r["token_ids"] for r in two["requests"]] == [r["token_ids"] for r in one["requests"]]


def test_only_the_listed_layers_are_quantized(engines: Engines, checkpoint: Checkpoint) -> None:
    methods = engines.results["eager"]["methods"]
    quantized = {name for name, method in methods.items() if method == "MorphoQuantLinearMethod"}
    assert {shard for name in quantized for shard in stored_shards(name, STORED_PREFIX)} == set(checkpoint.spec.layers)
    assert any(name.startswith("visual") for name in methods), "the vision tower is there, in 16 bit"


def towers_of(source: Path, media: dict[str, Path], media_text: str, quantize: str = "") -> dict[str, Tensor]:
    """The outputs of the source model's towers for the question's image and sound; one linear in int4 if named."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    if quantize:
        weight = model.get_submodule(quantize).weight
        codes, scale = weights.quantize_int4(weight.detach(), torch.ones(weight.shape[1]), 32)
        weight.data = weights.dequantize_weight(weights.pack(codes), scale)
    seen: dict[str, Any] = {}
    for name in ("visual", "audio_tower"):
        tower = model.get_submodule(name)
        tower.register_forward_hook(lambda tower, inputs, output, name=name: seen.__setitem__(name, output))
    inputs = AutoProcessor.from_pretrained(source)(
        text=[media_text],
        images=[Image.open(media["image"]).convert("RGB")],
        audio=[soundfile.read(media["audio"], dtype="float32")[0]],
        return_tensors="pt",
    )
    with torch.no_grad():
        model(**inputs)
    # One tensor per image.
    found = {"visual": torch.cat(seen["visual"].pooler_output), "audio_tower": seen["audio_tower"].last_hidden_state}
    return {name: tensor.flatten(0, -2) for name, tensor in found.items()}


def assert_sixteen_bit(served: Tensor, expected: Tensor) -> None:
    assert served.shape == expected.shape and float(expected.std()) > 0.1
    torch.testing.assert_close(served, expected, atol=SAME_NUMERICS, rtol=0)


@pytest.fixture(scope="module")
def sixteen_bit_towers(omni_source: Path, media: dict[str, Path], media_text: str) -> dict[str, Tensor]:
    return towers_of(omni_source, media, media_text)


@pytest.mark.parametrize("tower", ["visual", "audio_tower"], ids=["an image", "a sound"])
def test_nothing_is_quantized_before_it_reaches_the_decoder(
    engines: Engines, sixteen_bit_towers: dict[str, Tensor], tower: str
) -> None:
    """Wrongly quantized encoders are the worst failure of omni models seen in the field."""
    result = engines.results["eager"]
    methods = {method for name, method in result["methods"].items() if name.startswith(f"{tower}.")}
    # The audio tower is transformers' own: no method of vLLM's is in it.
    assert bool(methods) == (tower == "visual") and not any("Morpho" in method for method in methods)
    assert_sixteen_bit(torch.tensor(result["towers"][tower]), sixteen_bit_towers[tower])


@pytest.mark.parametrize(
    ("tower", "linear"),
    [("visual", "visual.blocks.1.attn.proj"), ("audio_tower", "audio_tower.layers.1.self_attn.out_proj")],
    ids=["an image", "a sound"],
)
def test_one_quantized_linear_of_a_tower_would_be_seen(
    omni_source: Path,
    media: dict[str, Path],
    media_text: str,
    sixteen_bit_towers: dict[str, Tensor],
    tower: str,
    linear: str,
) -> None:
    """The negative control: of one linear among many, and of its weights alone."""
    spoilt = towers_of(omni_source, media, media_text, quantize=linear)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_sixteen_bit(spoilt[tower], sixteen_bit_towers[tower])


def test_a_plain_model_is_untouched_by_the_installed_plugin(engines: Engines, llama_source: Path) -> None:
    result = engines.results["plain"]
    assert not any("Morpho" in method for method in result["methods"].values())
    model = AutoModelForCausalLM.from_pretrained(llama_source, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([TEXT_PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(TEXT_PROMPT[1:])[:, None]).flatten()
    torch.testing.assert_close(request_logprobs(result), expected, atol=SAME_NUMERICS, rtol=0)


def test_the_flag_on_a_plain_model_is_refused_in_one_line(engines: Engines, llama_source: Path) -> None:
    errors = engines.results["flag on a plain model"]["error"]
    assert errors[-1] == (
        f"MorphoQuantError: {llama_source}: is not a MorphoQuant checkpoint (config.json has no quantization_config); "
        "serve it without --quantization morphoquant, or make a checkpoint of it with `morphoquant calibrate`"
    )


def test_a_tensor_parallel_size_the_checkpoint_was_not_made_for_is_refused(engines: Engines) -> None:
    assert engines.results["tp2 of a tp1 checkpoint"]["error"]
    log = (engines.directory / "engines.log").read_text()
    assert "tensor parallel size 2 breaks a group: the checkpoint was made for sizes [1]" in log
