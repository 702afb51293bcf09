"""The head in vLLM's own layers: 8-bit if requested, else 16-bit and read in place if the CPU allows."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.cpu import head as cpu_head
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.head import quantize_outputs, rounding_bound
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from morphoquant_vllm.plugin.lm_head import SixteenBitHeadMethod
from tests.checkpoints import layer_specs

VOCABULARY, K = 100, 64


@pytest.fixture(params=[True, False], ids=["asked for", "not asked for"])
def asked(request, engine_context: None) -> Iterator[bool]:
    from vllm.config import VllmConfig, set_current_vllm_config

    settings = {"morphoquant": {"lm_head": "int8"}} if request.param else {}
    with set_current_vllm_config(VllmConfig(additional_config=settings)):
        yield request.param


def quantization() -> MorphoQuantConfig:
    from morphoquant_vllm.format.schema import QuantizationSpec

    return MorphoQuantConfig(QuantizationSpec(layers=layer_specs()))


def loaded(layer: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Load random rows as vLLM does; the padded weight."""
    rows = torch.randn(VOCABULARY, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer.weight.weight_loader(layer.weight, rows)
    return layer.weight.data.clone()


def process(*layers: torch.nn.Module) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)


def assert_eight_bit(layer: torch.nn.Module, weight: Tensor) -> None:
    """Logits of the loaded layer lie within the bound of the 16-bit weight's, and their cast's; they are not equal."""
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5)).bfloat16()
    y = layer.quant_method.apply(layer, x)
    assert y.shape == (2, 3, layer.num_embeddings_padded) and y.dtype is torch.bfloat16
    exact = x.double() @ weight.double().T
    # bfloat16 rounds a logit by at most 2^-9 of it; K float32 additions are lost in that.
    allowed = rounding_bound(x.flatten(0, 1), quantize_outputs(weight)[1]).view_as(y) + 2.0**-8 * exact.abs()
    moved = (y.double() - exact).abs()
    assert bool((moved <= allowed).all())
    assert float(moved.max()) > 0
    biased = layer.quant_method.apply(layer, x[0], torch.ones(layer.num_embeddings_padded, dtype=x.dtype))
    torch.testing.assert_close(biased, y[0] + 1)


def assert_sixteen_bit(layer: torch.nn.Module, weight: Tensor) -> None:
    """Logits are those of the 16-bit weight, summed in float32, and no unneeded packed copy is kept."""
    in_place = cpu_head.serves_bfloat16(weight)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5)).to(weight.dtype)
    y = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
    biased = layer.quant_method.apply(layer, x[0], torch.ones(layer.num_embeddings_padded, dtype=x.dtype))
    # If the product adds the bias itself, it casts once: half a unit more for y, and for its sum with 1.
    allowed = float(y.abs().max() + 1) * torch.finfo(y.dtype).eps
    torch.testing.assert_close(biased, y[0] + 1, rtol=0, atol=allowed)
    assert hasattr(layer, "cpu_linear") != in_place


def test_a_head_of_its_own_is_replaced_where_asked_for(asked: bool) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    layer = ParallelLMHead(VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=quantization(), prefix="lm_head")
    weight = loaded(layer)
    process(layer)
    if asked:
        assert_eight_bit(layer, weight)
        assert layer.weight.numel() == 0, "the 16-bit head is gone"
    else:
        assert type(layer.quant_method) is SixteenBitHeadMethod
        assert_sixteen_bit(layer, weight)
        assert torch.equal(layer.weight, weight)
        assert not list(layer.buffers())


def test_a_tied_head_leaves_the_embedding_untouched(asked: bool) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    config = quantization()
    embedding = VocabParallelEmbedding(VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=config)
    layer = ParallelLMHead(VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=config)
    layer = layer.tie_weights(embedding)
    weight = loaded(embedding)
    process(embedding, layer)
    assert torch.equal(embedding.weight, weight) and layer.weight is embedding.weight
    if asked:
        assert_eight_bit(layer, weight)
    else:
        assert_sixteen_bit(layer, weight)
    ids = torch.tensor([0, 99])
    assert torch.equal(embedding(ids), weight[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_than_bfloat16_is_left_to_vllm(dtype: torch.dtype, engine_context: None) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layer = ParallelLMHead(VOCABULARY, K, params_dtype=dtype, quant_config=quantization(), prefix="lm_head")
    weight = loaded(layer, dtype)
    process(layer)
    assert_sixteen_bit(layer, weight)


def test_an_embedding_that_is_the_head_itself_still_gives_logits(engine_context: None) -> None:
    """No packed copy of the embedding is made before it is asked for."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embedding = VocabParallelEmbedding(VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=quantization())
    weight = loaded(embedding)
    process(embedding)
    assert not hasattr(embedding, "cpu_linear")
    assert_sixteen_bit(embedding, weight)


@pytest.mark.parametrize("asked", [True], indirect=True)
@pytest.mark.parametrize("obstacle", ["no kernels", "head_dtype", "K"])
def test_what_cannot_be_served_stays_in_16_bit(asked: bool, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    channels = 40 if obstacle == "K" else K
    layer = ParallelLMHead(VOCABULARY, channels, params_dtype=torch.bfloat16, quant_config=quantization())
    torch.nn.init.normal_(layer.weight)
    weight = layer.weight.data.clone()
    if obstacle == "no kernels":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif obstacle == "head_dtype":
        layer.quant_method.head_dtype = torch.float32
    process(layer)
    x = torch.randn(3, channels).bfloat16()
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("asked", [True], indirect=True)
def test_a_damaged_head_is_refused(asked: bool) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if not cpu.available():
        pytest.skip("the CPU kernels do not run on this machine")
    layer = ParallelLMHead(VOCABULARY, K, params_dtype=torch.bfloat16, quant_config=quantization())
    loaded(layer)
    layer.weight.data[7, 7] = torch.nan
    with pytest.raises(MorphoQuantError, match=r"lm_head.weight: holds NaN"):
        process(layer)
