"""Weights that vLLM loads again into a running engine: into the same memory, so handles and CUDA graphs stay valid.

vLLM gives a layer its parameters back, loads them, and lets its method process them once more. The method then lays new
records out, whose content takes the place of the served one's. Channels that gate_up_proj and down_proj of an MLP
exchange are numbered anew when both have come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from vllm.config import VllmConfig

from morphoquant_vllm.backends import Records
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import CONFIG_FILE, read_spec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.plugin.checkpoint_check import check_directory


def replace_records(name: str, served: Records, loaded: Records) -> None:
    """Copy the records of `loaded` into those that are served. MorphoQuantError if one has another shape."""
    pairs = [pair for kind in zip(served, loaded, strict=True) for pair in zip(*kind, strict=True)]
    for old, new in pairs:
        if old.shape != new.shape or old.dtype != new.dtype:
            raise MorphoQuantError(
                f"{name}: the new weights need other memory than the served ones ({list(new.shape)}, "
                f"{list(old.shape)}); start a new server with them"
            )
    for old, new in pairs:
        old.copy_(new)


class ReloadCheck:
    """Checks a directory before the first of its quantized layers is used. Keeps which state it checked last."""

    def __init__(self) -> None:
        # Quantized layers that were loaded again so far.
        self.layers = 0
        # The settings of the directory that was checked last.
        self.found: QuantizationSpec | None = None
        self._checked: tuple[str, frozenset[tuple[str | int, ...]]] | None = None

    def check(self, config: VllmConfig, served: QuantizationSpec) -> None:
        """Refuse a directory that is damaged, or whose settings are not the served ones. Hub ids are not looked at."""
        self.layers += 1
        directory = Path(config.model_config.model)
        if not directory.is_dir():
            return
        state = (str(directory), _files(directory))
        if state == self._checked:
            return
        # The engine has its tokenizer already.
        check_directory(directory, complete=False)
        found = read_spec(directory)
        other = _other_field(found, served)
        if other is not None:
            raise MorphoQuantError(
                f"{directory / CONFIG_FILE}: its {other} are not those that are served; start a new server with it"
            )
        self._checked, self.found = state, found


def _files(directory: Path) -> frozenset[tuple[str | int, ...]]:
    """Name, size and identity of each file: any that is written anew differs.

    rsync and cp keep a file's time and size, but not its inode's number and time of change.
    """
    found = [(path.name, path.stat()) for path in directory.iterdir() if path.is_file()]
    return frozenset(
        (name, stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino, stat.st_ctime_ns) for name, stat in found
    )


def _settings(spec: QuantizationSpec) -> QuantizationSpec:
    # Scales of the cache stay those of the start: captured graphs hold them.
    return replace(spec, created_by="", integrity=None, kv_cache={})


def _other_field(found: QuantizationSpec, served: QuantizationSpec) -> str | None:
    """What differs between two checkpoints' config.json, in words; None if nothing does, as far as both list it."""
    if _settings(found) != _settings(served):
        return "layers, rows or token ids"
    if found.integrity is None or served.integrity is None:
        return None
    ours, theirs = found.integrity.config, served.integrity.config
    fields = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return f"settings ({', '.join(fields)})" if fields else None


class ReloadedPair:
    """gate_up_proj and down_proj of one MLP between two loads: whichever comes first waits for the other."""

    def __init__(self) -> None:
        self._waiting: dict[bool, tuple[dict[str, Tensor], Callable[[Tensor], None]]] = {}

    def forget(self) -> None:
        """Drop a layer whose other half did not come."""
        self._waiting.clear()

    def take(self, is_down: bool, tensors: dict[str, Tensor], finish: Callable[[Tensor], None]) -> None:
        """Keep one layer's `finish`; with the second, both get down_proj's channel order, int64 [K]."""
        self._waiting[is_down] = (tensors, finish)
        if len(self._waiting) < 2:
            return
        waiting, self._waiting = self._waiting, {}
        order = waiting[True][0]["channel_order"].long()
        for _, call in waiting.values():
            call(order)
