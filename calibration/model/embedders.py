"""Faults of an embedding model's modules.json that are seen before any work: steps that vLLM would leave out."""

from __future__ import annotations

from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import open_file, read_json
from morphoquant_vllm.format.pooling import MODULES_FILE, SentenceModule, read_modules

# Names of the classes, as sentence-transformers has written them. vLLM looks for these and skips the others; it takes
# the model itself from the directory, whatever stands for it.
_TRANSFORMER = (
    *("sentence_transformers.models.Transformer", "sentence_transformers.models.transformer.Transformer"),
    "sentence_transformers.base.modules.transformer.Transformer",
)
_POOLING = (
    "sentence_transformers.models.Pooling",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
)
_NORMALIZE = (
    "sentence_transformers.models.Normalize",
    "sentence_transformers.base.modules.normalize.Normalize",
    "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
)
_DENSE = (
    "sentence_transformers.models.Dense",
    "sentence_transformers.base.modules.dense.Dense",
    "pylate.models.Dense.Dense",
)
_DENSE_WEIGHTS = "model.safetensors"
# vLLM takes the first of these names that it finds.
_WEIGHT_NAMES = frozenset(("weight", "linear.weight", "dense.weight"))


def check_modules(directory: Path) -> None:
    """Refuse steps from hidden states to a vector that vLLM leaves out, and steps whose files it would not find."""
    for module in read_modules(directory):
        _check_kind(directory / MODULES_FILE, module)
        if module.kind in (*_POOLING, *_DENSE):
            read_json(directory / module.folder / "config.json")
        if module.kind in _DENSE:
            _check_dense(directory / module.folder)


def _check_kind(path: Path, module: SentenceModule) -> None:
    if module.kind not in (*_TRANSFORMER, *_POOLING, *_NORMALIZE, *_DENSE):
        raise MorphoQuantError(
            f"{path}: {module.kind} is not supported: vLLM would leave it out, since it reads Transformer, Pooling, "
            "Dense and Normalize of sentence-transformers alone; take another model"
        )
    if module.kind in _TRANSFORMER and module.folder:
        raise MorphoQuantError(
            f"{path}: its Transformer lies in {module.folder}, but vLLM reads the directory itself; move the model's "
            "files up and give it an empty path"
        )
    if module.kind in (*_POOLING, *_DENSE) and not module.folder:
        raise MorphoQuantError(f"{path}: {module.kind} has no folder of its own; download the model again")


def _check_dense(folder: Path) -> None:
    path = folder / _DENSE_WEIGHTS
    if not path.exists() and (folder / "pytorch_model.bin").exists():
        raise MorphoQuantError(
            f"{folder}: has pytorch_model.bin but no {_DENSE_WEIGHTS}; only safetensors is copied: save the folder's "
            "weights as safetensors"
        )
    # vLLM skips a file that is missing or damaged, or holds other names.
    with open_file(path) as file:
        if not _WEIGHT_NAMES & set(file.keys()):
            raise MorphoQuantError(f"{path}: holds no weight that vLLM looks for; download it again")
