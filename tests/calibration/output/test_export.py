import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.model.source import Source, open_source
from calibration.output.export import (
    LoadQuantized,
    checkpoint_size,
    copied_files,
    output_tensors,
    quantized_size,
    split_shards,
    with_query_scale,
    write_checkpoint,
)
from morphoquant_vllm.format.checkpoint import read_headers, read_spec
from morphoquant_vllm.format.layers import LayerSpec, tensor_specs
from morphoquant_vllm.format.schema import QuantizationSpec

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
SPEC = QuantizationSpec(
    layers={name: LayerSpec(64, 32, 32, "column", "model.layers.0.self_attn.qkv_proj") for name in LAYERS}
)


def make_source(directory: Path) -> Source:
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "name": "Zoë"}')
    (directory / "README.md").write_text("# The source")
    (directory / "tokenizer.model").write_bytes(b"\x00\xff\r\n")
    (directory / "chat_template.jinja").write_text("{{ messages }}\r\n")
    for name in ("spk_dict.pt", "optimizer.pt", "pytorch_model.bin", "model.gguf", ".gitattributes", "weights.pickle"):
        (directory / name).write_bytes(b"opaque")
    for folder in (".git", "assets", "onnx"):
        (directory / folder).mkdir()
    (directory / ".git" / "HEAD").write_text("x")
    (directory / "assets" / "speakers.json").write_text("{}")
    (directory / "assets" / "spk_dict.pt").write_bytes(b"opaque")
    (directory / "onnx" / "model.onnx").write_bytes(b"opaque")
    (directory / "onnx" / "model.onnx_data").write_bytes(b"opaque")
    torch.manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(32, 64).bfloat16() for name in LAYERS}
    tensors |= {f"{LAYERS[0]}.bias": torch.randn(32).bfloat16(), "lm_head.weight": torch.randn(100, 64)}
    tensors |= {"talker.codes": torch.arange(9), "token2wav.scalar": torch.tensor(2.5, dtype=torch.float16)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return open_source(directory)


def quantized_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the right shapes; the shards' tensors of their input are equal."""
    specs = tensor_specs(SPEC.layers[LAYERS[0]], len(SPEC.rows), SPEC.tensor_parallel)
    shared = {name: torch.ones(want.shape).to(want.dtype) for name, want in specs.items()}
    return {layer: {**shared, "weight_scale": torch.rand(32, 2).bfloat16()} for layer in LAYERS}


def loads(quantized: dict[str, dict[str, torch.Tensor]]) -> LoadQuantized:
    return lambda layer, tensor: quantized[layer][tensor].clone()


def test_files_are_copied_except_weights_pickles_hidden_ones_and_the_card(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    assert [str(path) for path in copied_files(source.directory)] == [
        "chat_template.jinja",
        "spk_dict.pt",
        "tokenizer.model",
    ]


SERVED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "tokenizer.model.v3", "tekken.json", "qwen.tiktoken"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *("generation_config.json", "configuration.json", "modeling_own.py", "LICENSE", "NOTICE.txt"),
    "additional_chat_templates/tools.jinja",
)
LEFT_BEHIND = (
    *("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "training_args.bin", "train.log"),
    *("all_results.json", "rng_state_0.pth", "scheduler.pt", "optimizer.pt", "quantize_config.json", "latest"),
    *("pytorch_model.bin.index.json", "zero_to_fp32.log", "events.out.tfevents.1", "samples.jsonl", "README.md"),
    *("checkpoint-500/tokenizer.json", "checkpoint-500/model.safetensors", "runs/a/events.out.tfevents.2"),
    *("original/params.json", "wandb/debug.log", "global_step5/mp_rank_00_model_states.pt", ".cache/tokenizer.json"),
)


def test_what_a_training_run_leaves_is_not_copied(tmp_path: Path) -> None:
    for name in (*SERVED, *LEFT_BEHIND):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {path.as_posix() for path in copied_files(tmp_path)} == set(SERVED)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weight_files_honour_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    before = os.umask(umask)
    try:
        (tmp_path / "out").mkdir()
        write_checkpoint(tmp_path / "out", source, SPEC, loads(quantized_tensors()), 10**9, {"format": 1}, {}, "")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: mode for path in files}


def test_a_checkpoint_of_one_file(tmp_path: Path) -> None:
    source, quantized = make_source(tmp_path / "m"), quantized_tensors()
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, source, SPEC, loads(quantized), 10**9, {"format": 1}, {}, "# Card\n")
    assert (out / "README.md").read_text() == "# Card\n"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "morphoquant_calibration.json",
        "morphoquant_calibration/distributions.safetensors",
        "spk_dict.pt",
        "tokenizer.model",
    ]
    for name in ("tokenizer.model", "chat_template.jinja", "spk_dict.pt"):
        assert (out / name).read_bytes() == (source.directory / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in source.config} == source.config
    assert replace(read_spec(out), integrity=None) == SPEC
    before = load_file(source.directory / "model.safetensors")
    after = load_file(out / "model-00001-of-00001.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(after), "model-00001-of-00001.safetensors")
    carried = {name for name in before if name.removesuffix(".weight") not in LAYERS}
    assert set(after) == carried | {f"{layer}.{name}" for layer in LAYERS for name in quantized[layer]}
    for name in carried:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    for layer in LAYERS:
        assert torch.equal(after[f"{layer}.weight_scale"], quantized[layer]["weight_scale"])


def test_shards_stay_below_the_limit_and_stand_in_the_index(tmp_path: Path) -> None:
    source, quantized = make_source(tmp_path / "m"), quantized_tensors()
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, source, SPEC, loads(quantized), 4000, {}, {}, "")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    headers = read_headers(out)  # refuses files and an index that do not agree
    assert set(headers) == {tensor.name for tensor in output_tensors(source, SPEC, loads(quantized))}
    sizes = {name: sum(t.nbytes for t in load_file(out / name).values()) for name in files}
    # lm_head alone is larger than the limit.
    assert [name for name, size in sizes.items() if size > 4000] == [headers["lm_head.weight"].file]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_the_size_is_known_before_the_work(tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, source, SPEC, loads(quantized_tensors()), 10**9, {}, {}, "")
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # The difference is the header of the weights, the index, the config and the report: kilobytes.
    assert 0 <= written - checkpoint_size(source, SPEC) < 20_000
    ours = sum(tensor.nbytes for layer in quantized_tensors().values() for tensor in layer.values())
    assert quantized_size(source, SPEC) == ours


def test_splitting() -> None:
    class Sized:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    shards = split_shards([Sized(size) for size in (5, 5, 1, 20, 1)], 10)  # type: ignore[misc]
    assert [[tensor.nbytes for tensor in shard] for shard in shards] == [[5, 5], [1], [20], [1]]


def test_vllm_finds_the_scale_of_late_queries_of_either_layout() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}
    scale = {"beta": 0.1, "original_max_position_embeddings": 16384}
    assert with_query_scale({"rope_parameters": rope}) == {"rope_parameters": rope, "llama_4_scaling": scale}
    nested = with_query_scale({"text_config": {"rope_parameters": rope}})
    assert nested["text_config"]["llama_4_scaling"] == scale and "llama_4_scaling" not in nested
    for plain in ({"rope_parameters": {"rope_type": "default"}}, {"rope_parameters": None}, {"llama_4_scaling": {}}):
        assert with_query_scale(plain) == plain
