"""The checkpoint that is damaged: small, valid, and with a file of every kind."""

import json
from pathlib import Path

import torch

from calibration.output.distributions import CODE_BINS, write_distributions
from calibration.output.report import make_report
from calibration.quantize.layer_report import LayerFigures
from calibration.quantize.modality_rows import RowChoice
from calibration.settings.recipe import Recipe
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.layers import ExpertsSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from tests.checkpoints import VOCABULARY, seal_again, write_random_checkpoint

KEPT_CHANNELS = 16
SEEN = ("text", "image", "massive")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "image_token_id": 7,
    "audio_token_id": 8,
    "vision_config": {"depth": 0, "id2label": {"0": "a"}, "sizes": [[1, 2], [3, None]]},
    "dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "5.19.0",
}
ADDED = {"<image>": 7, "<audio>": 8, "<|end|>": 9}


def write_intact(directory: Path) -> None:
    """Write the checkpoint, with its tokenizer, its calibration report and the distributions beside it."""
    experts = {"model.layers.0.block_sparse.experts": ExpertsSpec(2, 64, 64, 32, "two_level")}
    two_level = ("model.layers.0.mlp.gate_up_proj",)
    spec = write_random_checkpoint(directory, layers=1, two_level=two_level, experts=experts)
    path = directory / "config.json"
    _write(path, json.loads(path.read_text()) | CONFIG)
    seal_again(directory)
    entries = [{"id": token, "content": name, "special": True} for name, token in ADDED.items()]
    vocabulary = {f"t{token}": token for token in range(VOCABULARY - len(ADDED))}
    _write(directory / "tokenizer.json", {"version": "1.0", "added_tokens": entries, "model": {"vocab": vocabulary}})
    decoder = {str(entry["id"]): {"content": entry["content"]} for entry in entries}
    _write(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": "<|end|>"})
    _write(directory / "added_tokens.json", ADDED)
    _write(directory / "generation_config.json", {"eos_token_id": [9], "temperature": 0.7, "do_sample": True})
    _write(directory / "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "size": {"max_pixels": 12845056}})
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}\n")
    _write(directory / REPORT_FILE, make_report(Recipe(), spec, _figures(spec), 12, {0: 900, 1: 300, 5: 12}, {}))
    write_distributions(directory, _distributions(spec))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))


def _figures(spec: QuantizationSpec) -> dict[str, LayerFigures]:
    return {
        name: LayerFigures(
            escape_rate={"text": 0.01, "image": 0.04, "massive": 0.1, "all": 0.02},
            output_error=0.125 + number / 1000,
            masked_channels=dict.fromkeys(spec.rows, 6),
            guard_raised_channels=3,
            guard_largest_raise=1.5,
            massive_tokens=12,
            modality_rows={
                "text": RowChoice(False, "the default", 1.0),
                "image": RowChoice(True, "pays", 0.9, 0.2, 0.1),
            },
        )
        for number, name in enumerate(spec.layers)
    }


def _distributions(spec: QuantizationSpec) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for group, names in spec.shared_inputs().items():
        record = {"channels": torch.arange(KEPT_CHANNELS, dtype=torch.int32)}
        for row in SEEN:
            ranges = torch.randn(4, KEPT_CHANNELS, generator=generator).sort(0).values.bfloat16()
            for key, values in zip(("minimum", "low", "high", "maximum"), ranges, strict=True):
                record[f"{row}.{key}"] = values.clone()
            record[f"{row}.dispersion"] = torch.rand(spec.layers[names[0]].in_features, generator=generator).bfloat16()
            record[f"{row}.codes"] = torch.randint(0, 1000, (CODE_BINS,), generator=generator)
        found[group] = record
    return found
