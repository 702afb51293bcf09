"""vLLM's sharded_state: each rank's tensors saved as they are served, and loaded without being laid out again.

    save   vLLM writes the state of a rank -> beside it goes a manifest: SHA-256 of the files, shapes, settings
    load   the manifests are checked before workers start -> a layer makes tensors of the recorded shapes
           -> vLLM copies the files into them -> the layer is bound

vLLM's loader narrows a tensor of another size and takes any value. So the files are hashed whenever they are loaded,
MORPHOQUANT_CHECKSUMS=0 or not: nothing else checks what native code reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import ShardedStateLoader

import morphoquant_vllm
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import COPY_AGAIN, check_entries, read_json
from morphoquant_vllm.format.integrity import FileDigest, digest, file_digest
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.format.verify import checked_settings
from morphoquant_vllm.host_memory import zero_bytes
from morphoquant_vllm.plugin.checkpoint_check import refuse_pattern
from morphoquant_vllm.plugin.log import plugin_logger

if TYPE_CHECKING:
    from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

logger = plugin_logger(__name__)
FORMATS = ("sharded_state", "runai_streamer_sharded")
MANIFESTS = "morphoquant-state-*.json"
SAVE_AGAIN = "save the state again, into an empty directory"
# Mark of the function that writes a manifest after vLLM's.
_MARK = "writes_manifests"
_VERSION = f"morphoquant-vllm {morphoquant_vllm.__version__}"

# dtype, by its name in torch, and shape of each tensor of a weight and of an activation record.
Shapes = list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Place:
    """The place of a rank in its engine."""

    rank: int
    ranks: int
    stage: int
    stages: int

    @classmethod
    def of_this_process(cls) -> Place:
        """The place of this worker."""
        pipeline = get_pp_group()
        tensor = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        return cls(*tensor, pipeline.rank_in_group, pipeline.world_size)

    @property
    def file(self) -> str:
        """Name of the rank's manifest."""
        return MANIFESTS.replace("*", f"{self.rank}-of-{self.ranks}-stage-{self.stage}-of-{self.stages}")


@dataclass(frozen=True)
class RankState:
    """The manifest of one rank's saved state."""

    place: Place
    created_by: str
    backend: str
    # The digest of the served checkpoint, by `origin`.
    settings: str
    # Whether channels of an MLP are in down_proj's order.
    renumbered: bool
    files: dict[str, FileDigest]
    # By the name of a (fused) layer's first shard: its weight and its activation record.
    layers: dict[str, tuple[Shapes, Shapes]]

    def write(self, directory: Path) -> None:
        """Write the manifest, with a digest of itself."""
        content = asdict(self)
        text = json.dumps({**content, "digest": digest(content)}, indent=1)
        (directory / self.place.file).write_text(text + "\n")

    @classmethod
    def read(cls, path: Path) -> RankState:
        """Read a manifest; MorphoQuantError if it is damaged."""
        content = read_json(path)
        if content.pop("digest", None) != digest(content):
            raise MorphoQuantError(f"{path}: is damaged; {COPY_AGAIN}")
        try:
            files = {name: FileDigest(**file) for name, file in content.pop("files").items()}
            return cls(**{**content, "place": Place(**content["place"]), "files": files})
        except (KeyError, TypeError, AttributeError) as error:
            raise MorphoQuantError(f"{path}: is a manifest of another version ({error!r}); {SAVE_AGAIN}") from error


def origin(spec: QuantizationSpec) -> str:
    """A digest of one checkpoint: of its settings, and of the hashes of its files if it lists them.

    Two calibrations of a model have equal settings, but other weights.
    """
    return digest(replace(spec, created_by="").to_dict())


def has_state(directory: Path) -> bool:
    """Whether the directory holds a saved state of this method."""
    return any(directory.glob(MANIFESTS))


def check_state(directory: Path) -> None:
    """Refuse a directory of saved states that is incomplete, damaged, or of another config.json."""
    refuse_pattern(directory)
    check_entries(directory)
    # vLLM saves no tokenizer: it is copied by hand, or named by --tokenizer.
    spec = checked_settings(directory, complete=False)
    states = [RankState.read(path) for path in sorted(directory.glob(MANIFESTS))]
    listed: dict[str, FileDigest] = {}
    for state in states:
        _check_origin(directory / state.place.file, state, spec)
        listed |= state.files
    first = states[0].place
    expected = {
        Place(rank, first.ranks, stage, first.stages) for rank in range(first.ranks) for stage in range(first.stages)
    }
    if expected != {state.place for state in states}:
        raise MorphoQuantError(f"{directory}: holds {len(states)} of {len(expected)} ranks' states; {SAVE_AGAIN}")
    unlisted = sorted({path.name for path in directory.glob("*.safetensors")} - listed.keys())
    if unlisted:
        raise MorphoQuantError(f"{directory / unlisted[0]}: belongs to no saved state here; {SAVE_AGAIN}")
    for name, recorded in listed.items():
        path = directory / name
        if not path.is_file():
            raise MorphoQuantError(f"{path}: no such file; {COPY_AGAIN}")
        if file_digest(path) != recorded:
            raise MorphoQuantError(f"{path}: is damaged (its SHA-256 is not the recorded one); {COPY_AGAIN}")
    logger.info("MorphoQuant: %s: the saved states of %d ranks are in order", directory, len(states))


def _check_origin(path: Path, state: RankState, spec: QuantizationSpec) -> None:
    if state.created_by != _VERSION:
        raise MorphoQuantError(
            f"{path}: was saved by {state.created_by}, whose layout {_VERSION} may not share; {SAVE_AGAIN}"
        )
    if state.settings != origin(spec):
        raise MorphoQuantError(
            f"{path}: belongs to another checkpoint than the config.json beside it; copy config.json from the "
            f"checkpoint that was served, or {SAVE_AGAIN}"
        )


class SavedState:
    """The saved state that an engine loads, if it loads one; reads this rank's manifest when the first layer asks."""

    def __init__(self) -> None:
        # Set when the engine is configured, if its directory holds states.
        self.directory: Path | None = None
        self._state: RankState | None = None

    def take(self, directory: Path) -> bool:
        """Check the directory if it holds states; whether it does."""
        if not has_state(directory):
            return False
        check_state(directory)
        self.directory = directory
        return True

    def of_rank(self, config: VllmConfig | None) -> RankState | None:
        """This rank's manifest if the engine loads saved states. MorphoQuantError if they do not fit the engine."""
        wanted = config is not None and config.load_config.load_format in FORMATS
        if not wanted and self.directory is None:
            return None
        if not wanted:
            raise MorphoQuantError(
                f"{self.directory}: holds a saved state; serve it with --load-format sharded_state, or serve the "
                "checkpoint that it was saved of"
            )
        assert config is not None
        if self.directory is None:
            raise MorphoQuantError(
                f"{config.model_config.model}: is no local directory with states that save_sharded_state wrote; serve "
                "it without --load-format sharded_state"
            )
        if self._state is None:
            self._state = _read_fitting(self.directory, config)
        return self._state


def _read_fitting(directory: Path, config: VllmConfig) -> RankState:
    place = Place.of_this_process()
    path = directory / place.file
    if not path.is_file():
        saved = RankState.read(next(directory.glob(MANIFESTS))).place
        raise MorphoQuantError(
            f"{directory}: was saved with tensor parallel size {saved.ranks} and {saved.stages} pipeline stages; "
            "serve it with the same"
        )
    state = RankState.read(path)
    if state.renumbered and config.lora_config is not None:
        raise MorphoQuantError(
            f"{directory}: its MLPs have another channel order than adapters; serve the checkpoint itself with "
            "--enable-lora"
        )
    return state


def make_tensors(layer: torch.nn.Module, shapes: tuple[Shapes, Shapes]) -> None:
    """Register the buffers into which vLLM copies a layer's saved records."""
    device = torch.get_default_device()
    for kind, record in zip(("weight", "activation"), shapes, strict=True):
        for index, (name, shape) in enumerate(record):
            dtype: torch.dtype = getattr(torch, name)
            on_cpu = device.type == "cpu" and dtype is torch.uint8 and len(shape) == 1
            buffer = zero_bytes(shape[0]) if on_cpu else torch.zeros(shape, dtype=dtype)
            layer.register_buffer(record_name(kind, index), buffer)


def record_name(kind: str, index: int) -> str:
    """Name of a served tensor among a layer's buffers, and in a saved state."""
    return f"{kind}_record_{index}"


def patch_saving() -> None:
    """Let vLLM's save_sharded_state write a manifest beside the state of a model of this method.

    vLLM has no hook after it.
    """
    original = ShardedStateLoader.save_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def save_model(model: torch.nn.Module, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        methods = _methods(model)
        if not methods:
            original(model, path, pattern, max_size)
            return
        _refuse_unsaved(model)
        with TemporaryDirectory(dir=path, prefix=".saving-") as staged:
            original(model, staged, pattern, max_size)
            written = sorted(Path(staged).iterdir())
            state = _manifest_of(methods, {file.name: file_digest(file) for file in written})
            for file in written:
                file.replace(Path(path) / file.name)
        state.write(Path(path))

    setattr(save_model, _MARK, True)
    ShardedStateLoader.save_model = staticmethod(save_model)


def _methods(model: torch.nn.Module) -> list[MorphoQuantLinearMethod]:
    from morphoquant_vllm.plugin.linear_method import MorphoQuantLinearMethod

    methods = (getattr(module, "quant_method", None) for module in model.modules())
    return [method for method in methods if isinstance(method, MorphoQuantLinearMethod)]


def _refuse_unsaved(model: torch.nn.Module) -> None:
    """Refuse a model that keeps tensors outside its state."""
    from morphoquant_vllm.plugin.experts_method import MorphoQuantExpertsMethod
    from morphoquant_vllm.plugin.lm_head import EightBitHeadMethod

    for name, module in model.named_modules():
        method: Any = getattr(module, "quant_method", None)
        gone = getattr(module, "weight", None) is not None and not module.weight.numel()
        if isinstance(method, MorphoQuantExpertsMethod):
            raise MorphoQuantError(f"{name}: quantized experts cannot be saved as sharded_state; serve the checkpoint")
        if gone and isinstance(method, EightBitHeadMethod):
            raise MorphoQuantError(
                f"{name}: the 8-bit head keeps no 16-bit weight to save; save with a 16-bit head, and ask for the "
                "8-bit one when you serve the state"
            )
        if gone and isinstance(method, UnquantizedLinearMethod):
            raise MorphoQuantError(
                f"{name}: vLLM keeps its 16-bit weight in packed form only, on a CPU, and cannot save it; serve the "
                "checkpoint"
            )


def _manifest_of(methods: Sequence[MorphoQuantLinearMethod], files: dict[str, FileDigest]) -> RankState:
    return RankState(
        place=Place.of_this_process(),
        created_by=_VERSION,
        backend=methods[0].backend,
        settings=origin(_served_spec(methods[0])),
        renumbered=any(method.renumbered for method in methods),
        files=files,
        layers={method.name: _shapes(method) for method in methods},
    )


def _served_spec(method: MorphoQuantLinearMethod) -> QuantizationSpec:
    """The settings of the checkpoint that the engine loaded last."""
    reloaded = None if method.reload_check is None else method.reload_check.found
    return reloaded or method.spec


def _shapes(method: MorphoQuantLinearMethod) -> tuple[Shapes, Shapes]:
    assert method.served is not None
    weight, activation = (
        [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in record]
        for record in method.served
    )
    return weight, activation
