"""Mixtures of experts loaded by transformers' own `from_pretrained`."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import morphoquant_vllm.hf as hf
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from morphoquant_vllm import backends
from morphoquant_vllm.errors import MorphoQuantError
from tests.checkpoints import edit
from tests.reference_model import Checkpoint, swap_linears
from tests.tiny_conversations import write_calibration_data
from tests.tiny_experts import build_tiny_qwen3_moe, build_tiny_qwen3_omni_moe, build_tiny_qwen3_vl_moe

# How to build the model, its kind of data, its class, and (name in the weight files, name in transformers).
MODELS = {
    "qwen3_moe": (build_tiny_qwen3_moe, "text", "AutoModelForCausalLM", "", ""),
    "qwen3_vl_moe": (build_tiny_qwen3_vl_moe, "vl", "Qwen3VLMoeForConditionalGeneration", "", ""),
    "qwen3_omni_moe": (
        build_tiny_qwen3_omni_moe,
        "omni",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "thinker.",
        "",
    ),
}
IDS = torch.arange(20, 60)[None]
QUICK = Recipe(device="cpu", max_samples=2, rounding="nearest", regression=False, tensor_parallel=2)
MOE = "qwen3_moe"
FIRST = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("sources")
    return {name: build(directory / name) for name, (build, *_) in MODELS.items()}


@pytest.fixture(scope="module")
def checkpoints(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, (_, kind, *_) in MODELS.items():
        data = write_calibration_data(directory / f"{name}-data", kind)
        calibrate(sources[name], data, directory / name, recipe=QUICK)
    return {name: directory / name for name in MODELS}


def load(name: str, directory: Path, **arguments: object) -> nn.Module:
    return getattr(transformers, MODELS[name][2]).from_pretrained(directory, **arguments)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_are_the_reference_models_to_the_last_bit(
    sources: dict[str, Path], checkpoints: dict[str, Path], name: str
) -> None:
    model, report = load(name, checkpoints[name], dtype=torch.float32, output_loading_info=True)
    hf.configure(model, reference=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    plain = load(name, sources[name], dtype=torch.float32)
    sixteen_bit = logits(plain)
    reference = swap_linears(plain, Checkpoint(checkpoints[name]), *MODELS[name][3:])
    assert torch.equal(logits(model), logits(reference))
    assert (logits(model) - sixteen_bit).abs().max() > 0.1
    held = [module for module in model.modules() if isinstance(module, hf.MorphoQuantExperts)]
    assert len(held) == len(Checkpoint(checkpoints[name]).spec.experts) > 1


@pytest.mark.skipif(backends.select_backend(torch.device("cpu")) == "reference", reason="no CPU kernels run here")
def test_kernels_compute_within_the_bound_of_the_reference(checkpoints: dict[str, Path]) -> None:
    model = load(MOE, checkpoints[MOE], dtype=torch.float32)
    layer = next(module for module in model.modules() if isinstance(module, hf.MorphoQuantExperts))
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    ids, weights = torch.tensor([[0, 1], [1, 3], [2, 4]] * 3), torch.full((9, 2), 0.5)
    on_kernels = layer(x, ids, weights)
    hf.configure(model, reference=True)
    defined = layer(x, ids, weights)
    assert not torch.equal(on_kernels, defined)
    # In float32 gate and up differ in their last bits, which moves no code of these inputs.
    torch.testing.assert_close(on_kernels, defined, rtol=1e-5, atol=1e-5 * float(defined.abs().max()))
    hf.configure(model, reference=False)
    assert layer.to(torch.bfloat16)._prepared is None


def test_the_full_omni_model_loads_with_its_talker(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["qwen3_omni_moe"]
    full = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    thinker = load("qwen3_omni_moe", directory, dtype=torch.float32)
    assert torch.equal(logits(full.thinker), logits(thinker))


def test_exact_mode_and_one_row_for_all_tokens_reach_the_experts(checkpoints: dict[str, Path]) -> None:
    model = load(MOE, checkpoints[MOE], dtype=torch.float32)
    served = logits(model)
    layer = next(module for module in model.modules() if isinstance(module, hf.MorphoQuantExperts))
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * 20
    routing = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    plain = layer(x, *routing)
    hf.configure(model, exact=True, row="any")
    assert layer.mode.exact and layer.mode.row == layer.spec.any_row
    assert not torch.equal(layer(x, *routing), plain)
    hf.configure(model, exact=False)
    assert torch.equal(layer(x, *routing), plain) and torch.equal(logits(model), served)


def test_ids_of_no_expert_add_nothing(checkpoints: dict[str, Path]) -> None:
    model = load(MOE, checkpoints[MOE], dtype=torch.float32)
    layer = next(module for module in model.modules() if isinstance(module, hf.MorphoQuantExperts))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    half = torch.full((3, 1), 0.5)
    alone = layer(x, torch.tensor([[2]] * 3), half)
    assert torch.equal(layer(x, torch.tensor([[2, 4]] * 3), torch.full((3, 2), 0.5)), alone)
    assert not layer(x, torch.full((3, 1), 4), half).any()


def test_buffers_keep_their_dtypes_if_the_model_is_cast(checkpoints: dict[str, Path]) -> None:
    model = load(MOE, checkpoints[MOE], dtype=torch.float32).to(torch.bfloat16)
    stored = model.get_submodule(f"{FIRST}.1.down_proj")
    assert stored.centre.dtype == torch.float32 and stored.weight_codes.dtype == torch.uint8
    assert logits(model).dtype == torch.bfloat16


def test_damaged_experts_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for path in checkpoints[MOE].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path, f"{FIRST}.2.down_proj.gain", lambda gain: -gain)
    with pytest.raises(MorphoQuantError, match=f"{FIRST}.2.down_proj.gain: every value must be positive"):
        load(MOE, tmp_path)


def test_a_model_of_other_experts_is_refused(checkpoints: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoints[MOE])
    config.num_experts = 8
    with pytest.raises(MorphoQuantError, match=f"{FIRST}: the model has .*config.json does not belong"):
        load(MOE, checkpoints[MOE], config=config)


def test_another_activation_is_refused(checkpoints: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoints[MOE])
    config.hidden_act = "gelu"
    with pytest.raises(MorphoQuantError, match=f"{FIRST}: the model's experts have another activation than silu"):
        load(MOE, checkpoints[MOE], config=config)
