"""Which layers vLLM quantizes: names, fused layers, refusals. Needs vLLM, starts no engine."""

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.plugin.config import MorphoQuantConfig
from tests.checkpoints import file_of, write_random_checkpoint

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "attn.qkv": ["attn.qkv"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MorphoQuantConfig:
    spec = write_random_checkpoint(tmp_path_factory.mktemp("config") / "checkpoint")
    made = MorphoQuantConfig.from_config(spec.to_dict())
    made.packed_modules_mapping = PACKED
    return made


def test_shard_names(config: MorphoQuantConfig) -> None:
    assert config.shard_names("model.layers.0.self_attn.qkv_proj") == [
        f"model.layers.0.self_attn.{shard}_proj" for shard in "qkv"
    ]
    assert config.shard_names("model.layers.0.mlp.down_proj") == ["model.layers.0.mlp.down_proj"]
    assert config.shard_names("visual.blocks.0.attn.qkv") == ["visual.blocks.0.attn.qkv"]


def test_what_the_files_hold_fused_is_one_shard(config: MorphoQuantConfig) -> None:
    """As in GLM-4, whose class in vLLM lists gate_proj and up_proj nevertheless."""
    copy = pickle.loads(pickle.dumps(config))
    fused = "model.layers.0.mlp.gate_up_proj"
    copy.layers[fused] = copy.layers["model.layers.0.mlp.gate_proj"]
    assert copy.shard_names(fused) == [fused]


def test_shards_come_from_what_a_class_stacks_if_it_lists_none(
    config: MorphoQuantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As StableLM's class in vLLM."""
    from vllm.model_executor.models.stablelm import StablelmForCausalLM

    copy = pickle.loads(pickle.dumps(config))
    copy.packed_modules_mapping = {}
    prefix = "model.layers.0.self_attn.qkv_proj"
    assert copy.shard_names(prefix) == [prefix]
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: SimpleNamespace(model_config=object()))
    monkeypatch.setattr("vllm.model_executor.model_loader.utils.get_model_cls", lambda _: StablelmForCausalLM)
    assert copy.shard_names(prefix) == [f"model.layers.0.self_attn.{shard}_proj" for shard in "qkv"]
    assert copy.shard_names("visual.blocks.0.qkv_proj") == ["visual.blocks.0.qkv_proj"]
    assert copy.shard_names("model.layers.0.mlp.down_proj") == ["model.layers.0.mlp.down_proj"]


def test_a_layer_of_a_part_is_found_under_the_name_of_its_part(config: MorphoQuantConfig) -> None:
    """As in vLLM-Omni: the thinker's class drops "thinker.", the class around it puts it before the prefix again."""
    from vllm.model_executor.models.utils import WeightsMapper

    layers = {f"thinker.{name}": layer for name, layer in config.layers.items()}
    part = MorphoQuantConfig(replace(config.spec, layers=layers))
    part.packed_modules_mapping = PACKED
    part.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"thinker.model.": "language_model.model."}))
    within = "language_model.model.layers.0.self_attn"
    assert part.shard_names(f"thinker.{within}.o_proj") == part.shard_names(f"{within}.o_proj") == [f"{within}.o_proj"]
    assert part.shard_names(f"thinker.{within}.qkv_proj") == [f"{within}.{shard}_proj" for shard in "qkv"]
    # A layer of the talker that is called alike stays its own.
    assert not part.layers.keys() & set(part.shard_names(f"talker.{within}.o_proj"))


def test_the_config_is_made_of_settings_too(config: MorphoQuantConfig) -> None:
    """As vLLM-Omni's factory calls it."""
    settings = config.spec.to_dict()
    assert settings.pop("quant_method") == "morphoquant"
    assert MorphoQuantConfig(**settings).layers == config.layers
    with pytest.raises(MorphoQuantError, match="colour"):
        MorphoQuantConfig(**settings, colour="red")


def test_the_config_survives_pickling(config: MorphoQuantConfig) -> None:
    copy = pickle.loads(pickle.dumps(config))
    assert copy.spec == config.spec and copy.layers == config.layers


def test_the_mapper_may_run_twice(config: MorphoQuantConfig) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    copy = pickle.loads(pickle.dumps(config))
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    copy.apply_vllm_mapper(mapper)
    copy.apply_vllm_mapper(mapper)
    assert "language_model.model.layers.0.self_attn.q_proj" in copy.layers
    assert len(copy.layers) == len(config.layers)


def test_a_fused_layer_is_quantized_whole_or_not_at_all(config: MorphoQuantConfig, monkeypatch) -> None:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    layer = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    prefix = "model.layers.0.self_attn.qkv_proj"
    method = config.get_quant_method(layer, prefix)
    assert type(method).__name__ == "MorphoQuantLinearMethod"
    assert [name.rsplit(".", 1)[1] for name in method.shards] == ["q_proj", "k_proj", "v_proj"]
    assert isinstance(config.get_quant_method(layer, "visual.blocks.0.attn.qkv"), UnquantizedLinearMethod)
    monkeypatch.delitem(config.layers, "model.layers.0.self_attn.k_proj")
    with pytest.raises(MorphoQuantError, match=r"qkv_proj: shards of a fused layer must all .*k_proj"):
        config.get_quant_method(layer, prefix)


def test_a_worker_with_a_quantized_layer_refuses_what_would_lose_weights(
    config: MorphoQuantConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.v1.worker import gpu_worker

    # Each has the mark of its module once a quantized layer got its method.
    patched = {"sleep": "refuses_level_two", "reset_weights": "refuses_quantized"}
    names = [name for name in patched if hasattr(gpu_worker.Worker, name)]
    for name in names:
        monkeypatch.setattr(gpu_worker.Worker, name, lambda self: None)
    layer = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(layer)
    config.get_quant_method(layer, "visual.blocks.0.attn.qkv")
    assert not any(hasattr(getattr(gpu_worker.Worker, name), patched[name]) for name in names)
    config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert all(hasattr(getattr(gpu_worker.Worker, name), patched[name]) for name in names)


def test_embeddings_stay_16_bit_and_tell_the_bus_their_tokens(config: MorphoQuantConfig) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from morphoquant_vllm.plugin.lm_head import SixteenBitHeadMethod
    from morphoquant_vllm.plugin.modality_bus import ModalityEmbeddingMethod

    assert config.get_quant_method(torch.nn.Embedding(2, 2), "") is None
    # lm_head never switches; it is dispatched by type, since its prefix may be empty.
    assert type(config.get_quant_method(ParallelLMHead.__new__(ParallelLMHead), "")) is SixteenBitHeadMethod
    method = config.get_quant_method(VocabParallelEmbedding.__new__(VocabParallelEmbedding), "")
    assert isinstance(method, ModalityEmbeddingMethod)
    assert method.bus is config.modality_bus()


def test_a_copy_of_the_config_has_a_bus_of_its_own(config: MorphoQuantConfig) -> None:
    bus = config.modality_bus()
    assert config.modality_bus() is bus
    assert pickle.loads(pickle.dumps(config)).modality_bus() is not bus


def test_files_are_checked_before_any_worker_starts(tmp_path: Path) -> None:
    spec = write_random_checkpoint(tmp_path / "checkpoint")
    config = MorphoQuantConfig.from_config(spec.to_dict())
    config.maybe_update_config(str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "added_tokens.json").write_text('{"<image>": 1}')
    with pytest.raises(
        MorphoQuantError, match="has token 7 for image, but the tokenizer does not list it as an added token"
    ):
        config.maybe_update_config(str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "added_tokens.json").unlink()
    file_of(tmp_path / "checkpoint", "model.layers.0.mlp.down_proj.weight_codes").unlink()
    with pytest.raises(MorphoQuantError, match="model-0000"):
        config.maybe_update_config(str(tmp_path / "checkpoint"))


def test_a_plain_model_is_refused_by_name() -> None:
    with pytest.raises(MorphoQuantError, match=r"some/model: is not a MorphoQuant checkpoint"):
        MorphoQuantConfig().maybe_update_config("some/model")
