"""What learning aims at: the next token's probabilities in the 16-bit model, for tokens whose successor is text."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from calibration.learn.divergence import LOGITS_TOKENS, Divergence
from calibration.learn.head import Head
from calibration.learn.targets import Objective, Pass16Bit, Target, counted_tokens
from calibration.model.architectures import find_architecture
from calibration.model.discovery import choose_architecture
from calibration.model.plan import decoder_names
from calibration.model.source import open_source
from calibration.settings.recipe import Recipe
from tests.calibration.blocks.test_sensitivity import inputs_of
from tests.calibration.built_models import TinyModels
from tests.tiny_decoders import build_tiny_decoder
from tests.tiny_media_models import build_tiny_qwen2_audio

TEXT, IMAGE = 0, 1
EMBEDDING = "language_model.model.embed_tokens.weight"


def head_of(directory: Path) -> Head:
    source, recipe = open_source(directory), Recipe(device="cpu")
    architecture = choose_architecture(source, recipe)
    names = decoder_names(architecture, source.config, source.tensors)
    return Head(architecture, names, source, recipe, torch.device("cpu"))


def test_a_token_counts_if_text_follows_and_it_is_not_massive() -> None:
    modality = torch.tensor([TEXT, TEXT, IMAGE, IMAGE, TEXT, TEXT], dtype=torch.int32)
    massive = torch.tensor([True, False, False, False, False, False])
    assert counted_tokens(modality, massive, TEXT).tolist() == [False, False, False, True, True, False]


def test_divergence_and_its_gradient_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    # More tokens than are computed at once.
    states, wanted = (torch.randn(LOGITS_TOKENS + 7, 16, generator=generator) for _ in range(2))
    head = torch.randn(50, 16, generator=generator)
    own = states.requires_grad_()
    found = Divergence.apply(own, wanted, head)
    logs = ((own @ head.T).log_softmax(-1), (wanted @ head.T).log_softmax(-1))
    expected = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    # float32 sums over 50 tokens of a vocabulary.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight = torch.rand(len(found), generator=generator)
    gradients = [torch.autograd.grad((part * weight).sum(), own, retain_graph=True)[0] for part in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert float(Divergence.apply(wanted, wanted, head).abs().max()) < 1e-5


def test_a_head_that_was_published_beside_its_decoder_is_found(tmp_path: Path) -> None:
    """Not the embedding: Qwen2-Audio's head has weights of its own."""
    build_tiny_qwen2_audio(tmp_path)
    stored = open_source(tmp_path).load("language_model.lm_head.weight").float()
    found = head_of(tmp_path)
    assert torch.equal(found.weight, stored) and not torch.equal(found.weight, open_source(tmp_path).load(EMBEDDING))


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_last_states_give_the_logits_of_the_model(tiny: TinyModels, name: str) -> None:
    directory = tiny.model(name)
    classes = {"llama": "LlamaForCausalLM", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    model = getattr(transformers, classes[name]).from_pretrained(directory, dtype=torch.float32)
    last: list[torch.Tensor] = []
    source = open_source(directory)
    blocks = model.get_submodule(find_architecture(source.config).block_module)
    blocks[-1].register_forward_hook(lambda block, given, output: last.append(output))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        head = head_of(directory)
        states = (last[0] if isinstance(last[0], torch.Tensor) else last[0][0])[0]
        torch.testing.assert_close(head.normed(states) @ head.weight.T, logits, rtol=1e-4, atol=1e-4)


def test_a_channel_that_the_final_norm_drops_does_not_matter(tiny: TinyModels, tmp_path: Path) -> None:
    """A pruned or padded model: 0 / 0 is no number."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model("llama"), model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    head, original = head_of(model), head_of(tiny.model("llama"))
    assert torch.equal(head.weight, original.weight)


def test_a_factor_of_the_logits_counts(tmp_path: Path) -> None:
    directory = build_tiny_decoder("cohere", tmp_path / "cohere")
    config = transformers.AutoConfig.from_pretrained(directory)
    plain = open_source(directory).load("model.embed_tokens.weight").float()
    torch.testing.assert_close(head_of(directory).weight, plain * config.logit_scale, rtol=1e-5, atol=0)


def test_the_derivative_is_that_of_the_mean_divergence_and_tokens_that_do_not_count_have_none(tiny: TinyModels) -> None:
    objective = Objective(head_of(tiny.model("llama")))
    generator = torch.Generator().manual_seed(0)
    last, other, step = (torch.randn(6, 128, generator=generator) for _ in range(3))
    counted = torch.tensor([False, True, True, False, True, True])
    target = Target(objective.head.normed(other), counted)
    value, found = objective.derivatives(last, target)
    assert value == pytest.approx(float(objective.divergences(last, target).mean().detach()))
    assert bool((found[~counted] == 0).all()) and bool((found[counted] != 0).any())
    slopes = [objective.derivatives(last + sign * 1e-3 * step, target)[0] for sign in (1, -1)]
    # A central difference in float32.
    assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(float((found * step).sum()), rel=0.02)


def test_the_pass_gives_the_states_of_the_16_bit_model_and_the_sizes_of_its_outputs(tiny: TinyModels) -> None:
    loader, samples = inputs_of(tiny, "llama")
    names = {"self_attn.o_proj": "model.layers.{}.self_attn.o_proj", "mlp.down_proj": "model.layers.{}.mlp.down_proj"}
    found = Pass16Bit(loader, lambda index: {place: name.format(index) for place, name in names.items()}, samples)
    for index in range(len(loader)):
        block = loader.load(index)
        before = list(found.states)
        found.forward(index)
        squares = []
        block.mlp.down_proj.register_forward_hook(
            lambda module, given, output, squares=squares: squares.append(output[0].square().mean(-1))
        )
        for sample, state, after in zip(samples, before, found.states, strict=True):
            with torch.no_grad():
                assert torch.equal(block(state, **sample.arguments[index]), after)
        median = float(torch.cat(squares).median().sqrt())
        assert found.sizes[f"model.layers.{index}.mlp.down_proj"] == pytest.approx(median)
    assert found.sizes.keys() == {name.format(index) for name in names.values() for index in range(len(loader))}
    assert [part.shape for part in found.massive] == [sample.modality.shape for sample in samples]
