"""Merge a LoRA adapter into its 16-bit model, which can then be calibrated.

pip install ".[calibration,lora]"    # in a checkout
python examples/merge_lora.py MODEL ADAPTER MERGED
morphoquant calibrate MERGED --data conversations.jsonl --output OUT

Of Qwen2.5-Omni, the adapter changes the thinker. Every file and tensor that it does not change stays as it was.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from morphoquant_vllm.errors import missing_package

try:
    from peft import PeftModel
except ImportError:
    sys.exit(f"error: {missing_package('peft', 'lora')}")


def merged_model(directory: Path, adapter: Path) -> tuple[transformers.PreTrainedModel, str]:
    """The part of the model that has the adapter, merged, and the beginning of its tensors' names in the files."""
    config = transformers.AutoConfig.from_pretrained(directory)
    omni = config.model_type == "qwen2_5_omni"
    name = "Qwen2_5OmniThinkerForConditionalGeneration" if omni else config.architectures[0]
    model_class: Any = getattr(transformers, name)
    model = model_class.from_pretrained(directory, dtype="auto")
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return merged, "thinker." if omni else ""


def places_of(merged: Path, prefix: str) -> dict[str, tuple[Path, str]]:
    """File and name of every merged tensor, by its name in the source."""
    places = {}
    for path in merged.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
        places |= {prefix + name: (path, name) for name in names}
    return places


def write_weights(source: Path, places: dict[str, tuple[Path, str]], output: Path) -> int:
    """Write the source's weight files with the merged tensors in their places; the number of changed tensors."""
    changed, written = 0, set()
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        for name in tensors.keys() & places.keys():
            merged, merged_name = places[name]
            with safe_open(merged, "pt") as file:
                tensor = file.get_tensor(merged_name).to(tensors[name].dtype)
            changed += not torch.equal(tensor, tensors[name])
            tensors[name] = tensor
        written |= tensors.keys()
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    if lost := sorted(places.keys() - written):
        sys.exit(f"error: {source} has no tensor {lost[0]}; this model's names need a merge of their own")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into its 16-bit model.")
    parser.add_argument("model", type=Path, help="directory of the 16-bit model")
    parser.add_argument("adapter", type=Path, help="directory with adapter_config.json")
    parser.add_argument("output", type=Path, help="directory of the merged model; it must not exist")
    arguments = parser.parse_args()
    source, output = arguments.model, arguments.output
    if output.exists():
        sys.exit(f"error: {output} exists; name a new directory")

    model, prefix = merged_model(source, arguments.adapter)
    # Everything is written beside its place first, so `output` appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=output.resolve().parent) as temporary:
        # transformers writes the tensors under their published names.
        model.save_pretrained(Path(temporary) / "merged")
        whole = Path(temporary) / "whole"
        shutil.copytree(source, whole, ignore=shutil.ignore_patterns("*.safetensors"))
        changed = write_weights(source, places_of(Path(temporary) / "merged", prefix), whole)
        if not changed:
            sys.exit(f"error: {arguments.adapter} changes no weight of {source}; name the model that it was trained on")
        whole.rename(output)
    print(f"{output}: {changed} tensors changed; next: morphoquant calibrate {output} --data DATA --output OUT")


if __name__ == "__main__":
    main()
