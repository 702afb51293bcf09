"""A LoRA adapter merged into tiny models."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.examples.running import run
from tests.tiny_models import build_tiny_llama, build_tiny_omni, build_tiny_qwen2_5_vl

RANK, ALPHA = 4, 6
# Classes on which an adapter is trained, the names of their decoder layers, and the names in the files.
MODELS = {
    "omni": (
        build_tiny_omni,
        transformers.Qwen2_5OmniThinkerForConditionalGeneration,
        ("base_model.model.model.layers.", "thinker.model.layers."),
    ),
    "qwen2_5_vl": (
        build_tiny_qwen2_5_vl,
        transformers.Qwen2_5_VLForConditionalGeneration,
        ("base_model.model.model.language_model.layers.", "model.layers."),
    ),
    "llama": (build_tiny_llama, transformers.LlamaForCausalLM, ("base_model.model.model.layers.", "model.layers.")),
}


def write_adapter(directory: Path, kind: str, source: Path, *, trained: bool = True) -> Path:
    """An adapter with random products or, as training begins, with products of zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed; make setup installs it")
    model = MODELS[kind][1].from_pretrained(source, dtype=torch.float32)
    targets = r".*model\.(language_model\.)?layers.*\.(q_proj|down_proj)"
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=not trained)
    peft.get_peft_model(model, settings).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapters_products_are_added_and_nothing_else_changes(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build, _, names = MODELS[kind]
    source, merged = build(tmp_path / "source"), tmp_path / "merged"
    adapter = write_adapter(tmp_path / "adapter", kind, source)
    run(monkeypatch, "merge_lora.py", source, adapter, merged)
    before, after = (load_file(directory / "model.safetensors") for directory in (source, merged))
    factors = load_file(adapter / "adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    stored = {layer: f"{layer.replace(*names)}.weight" for layer in layers}
    assert len(layers) == 4 and before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(stored.values())
    for layer, name in stored.items():
        product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] * ALPHA / RANK
        # Factors and sum are rounded to bfloat16: a few steps of 2**-8 of the values, which lie within 1.
        torch.testing.assert_close(after[name].float(), before[name].float() + product, rtol=2**-7, atol=1e-2)
        assert float(product.abs().max()) > 0.1
    others = {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert {path.name for path in merged.iterdir()} == {*others, "model.safetensors"}
    assert all((source / name).read_bytes() == (merged / name).read_bytes() for name in others)


def test_an_adapter_that_changes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = build_tiny_llama(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", "llama", source, trained=False)
    with pytest.raises(SystemExit, match=r"^error: .*adapter changes no weight of .*source"):
        run(monkeypatch, "merge_lora.py", source, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "adapter"}


def test_a_merged_tensor_without_a_place_in_the_source_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = build_tiny_llama(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", "llama", source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"^error: .*source has no tensor model\.norm\.weight"):
        run(monkeypatch, "merge_lora.py", source, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "adapter"}


def test_without_peft_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        SystemExit, match=r"^error: the Python package 'peft' is missing; run pip install '\.\[lora\]' in a"
    ):
        run(monkeypatch, "merge_lora.py", tmp_path, tmp_path, tmp_path / "merged")
