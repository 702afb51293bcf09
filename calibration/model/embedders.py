"""Faults of an embedding model's modules.json that are seen before any work: steps that vLLM would take otherwise."""

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
# vLLM warns of other ways, or takes the last of several, and goes on.
_MODE, _MODES = "pooling_mode_", ("cls", "cls_token", "mean", "mean_tokens", "lasttoken")
# Without one of these, or torch's Identity, vLLM would leave the whole projection out.
_TORCH = "torch.nn.modules."
_ACTIVATIONS = frozenset(
    (
        *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"),
        *("relu", "relu2", "sigmoid", "silu", "swish", "tanh", "xielu"),
    )
)
_DENSE_WEIGHTS = "model.safetensors"
# vLLM takes the first of these names that it finds.
_WEIGHT_NAMES = frozenset(("weight", "linear.weight", "dense.weight"))


def check_modules(directory: Path) -> None:
    """Refuse steps from hidden states to a vector that vLLM leaves out, reads otherwise, or would not find."""
    modules = read_modules(directory)
    for module in modules:
        _check_kind(directory / MODULES_FILE, module)
        if module.kind in _POOLING:
            _check_pooling(directory / module.folder)
        if module.kind in _DENSE:
            _check_dense(directory / module.folder)
    _check_order(directory / MODULES_FILE, modules)


def _check_order(path: Path, modules: list[SentenceModule]) -> None:
    """vLLM takes the steps in this order, and one Pooling, whatever the list says."""
    order = (_TRANSFORMER, _POOLING, _DENSE, _NORMALIZE)
    places = [next(place for place, kinds in enumerate(order) if module.kind in kinds) for module in modules]
    if places != sorted(places) or any(places.count(place) > 1 for place in (0, 1, 3)):
        names = ", ".join(module.kind.rpartition(".")[2] for module in modules)
        raise MorphoQuantError(
            f"{path}: its steps are {names}, but vLLM makes one Transformer, one Pooling, any number of Dense and one "
            "Normalize, in this order; take another model"
        )


def _check_pooling(folder: Path) -> None:
    path = folder / "config.json"
    config = read_json(path)
    modes = [name.removeprefix(_MODE) for name, value in config.items() if name.startswith(_MODE) and value is True]
    if isinstance(config.get("pooling_mode"), str):
        modes.append(config["pooling_mode"])
    if len(modes) != 1 or modes[0] not in _MODES:
        raise MorphoQuantError(
            f"{path}: pools by {' and '.join(modes) or 'nothing'}, but vLLM pools by one of {', '.join(_MODES)}; take "
            "another model"
        )


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
    path = folder / "config.json"
    activation = str(read_json(path).get("activation_function") or "torch.nn.modules.linear.Identity")
    name = activation.lower()
    if name.startswith(_TORCH):
        name = name.rpartition(".")[2]
        known = name in _ACTIVATIONS or name == "identity"
    else:
        known = name in _ACTIVATIONS
    if not known:
        raise MorphoQuantError(f"{path}: vLLM does not know its activation_function {activation}; take another model")
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
