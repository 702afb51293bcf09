"""The row of each token in a model of transformers: whichever way it is called, copied or shared by threads."""

import copy
import io
import threading

import pytest
import torch
from torch import Tensor, nn

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.hf.linear import Mode, MorphoQuantLinear
from morphoquant_vllm.hf.settings import TOKEN_ROWS, configure
from morphoquant_vllm.numerics.linear import linear
from tests.checkpoints import random_group
from tests.records import activation_of, weight_of

IMAGE = 7
LAYER = LayerSpec(64, 48, 32, "column", "m")
SPEC = QuantizationSpec(layers={"m": LAYER}, placeholder_token_ids={"image": (IMAGE,)})
TEXTS, IMAGES = torch.tensor([[1, 2, 3]]), torch.full((1, 3), IMAGE)


class Inner(nn.Module):
    """An embedding and a quantized linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 64)
        self.linear = MorphoQuantLinear("m", LAYER, SPEC, Mode(SPEC.any_row))

    def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        return self.linear(self.embedding(ids) if embeds is None else embeds)


class Model(nn.Module):
    """A model around it, as transformers nests them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embedding

    def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        return self.inner(ids, embeds)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model().requires_grad_(False)
    (tensors,) = random_group([torch.randn(48, 64)], LAYER, SPEC, torch.tensor(2))
    made.inner.linear.load_state_dict(tensors)
    configure(made, row=TOKEN_ROWS, reference=True)
    return made


def expected(model: Model, ids: Tensor, row: str) -> Tensor:
    """The output for tokens of one row."""
    tensors = model.inner.linear.tensors()
    rows = torch.full((ids.numel(),), SPEC.rows.index(row), dtype=torch.int32)
    embeds = model.inner.embedding.weight[ids.flatten()]
    return linear(embeds, rows, weight_of(tensors), activation_of(tensors))[None]


def test_rows_are_those_of_the_embedded_tokens(model: Model) -> None:
    assert torch.equal(model(TEXTS), expected(model, TEXTS, "text"))
    assert torch.equal(model(IMAGES), expected(model, IMAGES, "image"))
    assert not torch.equal(expected(model, TEXTS, "text"), expected(model, TEXTS, "any"))


def test_an_inner_module_leaves_no_rows_for_the_next_call(model: Model) -> None:
    assert torch.equal(model.inner(IMAGES), expected(model, IMAGES, "image"))
    embeds = model.inner.embedding(TEXTS)
    assert torch.equal(model.inner(embeds=embeds), expected(model, TEXTS, "any"))
    model.inner.embedding(IMAGES)
    assert torch.equal(model.inner(embeds=embeds), expected(model, TEXTS, "any"))
    assert torch.equal(model(embeds=embeds), expected(model, TEXTS, "any"))


def test_a_pass_that_fails_leaves_no_rows(model: Model) -> None:
    refusing = model.inner.linear.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IMAGES)
    refusing.remove()
    embeds = model.inner.embedding(TEXTS)
    assert torch.equal(model.inner.linear(embeds), expected(model, TEXTS, "any"))
    assert torch.equal(model(IMAGES), expected(model, IMAGES, "image"))


def test_a_copied_and_a_saved_model_have_rows_of_their_own(model: Model) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(IMAGES), expected(model, IMAGES, "image"))
        configure(other, row="any")
        assert torch.equal(other(IMAGES), expected(model, IMAGES, "any"))
        assert torch.equal(model(IMAGES), expected(model, IMAGES, "image"))


def test_threads_do_not_mix_their_rows(model: Model) -> None:
    # The other thread embeds images between the embedding and the linear of this one.
    model.inner.embedding.register_forward_hook(lambda *_: in_another_thread())
    answers: list[Tensor] = []

    def in_another_thread() -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: answers.append(model(IMAGES)))
            thread.start()
            thread.join()

    assert torch.equal(model(TEXTS), expected(model, TEXTS, "text"))
    assert torch.equal(answers[0], expected(model, IMAGES, "image"))
