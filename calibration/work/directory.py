"""The work directory of a calibration: the finished work, from which an interrupted run resumes.

    lock                        held by the active run
    run.json                    fingerprint of the run (calibration.work.fingerprint), and its number of threads
    samples.json                the samples, and their files' sizes and hashes: written when all files are complete
    budgets.json                choices before the blocks: learning, forms, escape budgets: calibration.work.budgets
    metrics-00000.safetensors   how errors of outputs of a block's layers add up, if the checkpoint will learn
    sensitivity-00000.safetensors  states between the 16-bit blocks, while budgets or metrics are measured
    learn-targets.safetensors, learn-state.safetensors  unfinished learning: calibration.work.learned
    learned.safetensors, learned.json  what was learned, and its figures: the same
    towers.safetensors          the tensors of quantized towers, and their distributions
    rendered-00000.safetensors  the model's inputs of one sample with media, until the next file is written for all
    sample-00000.safetensors    the decoder's inputs of one sample
    block-00000.safetensors     a finished block's tensors in their final form, and its distributions
    block-00000.json            its layers' figures, and the hashes of all its files: written last
    hidden-00001.safetensors    hidden states before the next block, in the 16-bit model
    served-00001.safetensors    the same, after the quantized blocks
    hidden-00001-process1.safetensors, ...  the same for the samples of processes other than the first
    exported.json               hashes that identify the finished checkpoint: written before it is renamed into place

Every file gets its name when it is complete and on the disk. A block is finished when its .json exists. Each process
writes the files of its samples; the first one writes all other files, and holds the lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from calibration.blocks.capture import BlockInput, MemoryInput
from calibration.blocks.results import BlockResult
from calibration.processes import ONE, Processes
from calibration.quantize.layer_report import ExpertsFigures, LayerFigures
from calibration.quantize.modality_rows import RowChoice
from calibration.work.block_arguments import pack
from calibration.work.durable_files import (
    FileRecord,
    TensorReader,
    check_file,
    damaged,
    hash_file,
    read_manifest,
    read_tensors,
    sync_directory,
    write_json_durably,
    write_tensors_durably,
)
from calibration.work.hidden_states import (
    STREAMS,
    TOWERS_FILE,
    DiskInput,
    Stream,
    read_arguments,
    sample_file,
    states_file,
)
from morphoquant_vllm.format.checkpoint import CONFIG_FILE
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.kv_cache import AttentionRange
from morphoquant_vllm.format.layers import stored_name

K = TypeVar("K")
V = TypeVar("V")

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.json"
EXPORTED_FILE = "exported.json"
# Files that identify a checkpoint.
_IDENTIFYING = (CONFIG_FILE, REPORT_FILE)
# Prefix of a block file's tensors that are not part of the checkpoint.
_DISTRIBUTION = "distribution"


def block_file(directory: Path, index: int) -> Path:
    """The file of a finished block's tensors."""
    return directory / f"block-{index:05}.safetensors"


@dataclass
class WorkDirectory:
    """A work directory that this run holds; each of its processes has an instance, and makes the same calls."""

    path: Path
    device: torch.device
    # SHA-256 of the run's fingerprint.
    fingerprint_hash: str
    # Number of threads of each process, from the run's first start to its end.
    threads: int
    # SHA-256 of RUN_FILE, which every manifest repeats.
    run_hash: str = ""
    # Number of finished blocks; None if the samples are not finished either.
    finished: int | None = None
    # Whether the checkpoint is in place; only the work directory must then be removed.
    exported: bool = False
    processes: Processes = ONE
    _streams: dict[str, Stream] = field(default_factory=dict)
    # The file whose tensor was asked for last.
    _reader: TensorReader | None = None
    # Entry of samples.json about quantized towers.
    _towers: dict[str, Any] = field(default_factory=dict)

    def keep_towers(self, results: Sequence[BlockResult]) -> None:
        """Write the quantized towers; they count as finished when the samples are."""
        tensors = {name: value for result in results for name, value in _packed(result).items()}
        record = self.processes.broadcast(lambda: write_tensors_durably(self.path / TOWERS_FILE, tensors), [FileRecord])
        layers = {name: asdict(layer.figures) for result in results for name, layer in result.layers.items()}
        self._towers = {"towers": {"layers": layers, **asdict(record)}}

    def keep_samples(self, sources: Mapping[int, str], captured: Iterable[MemoryInput]) -> None:
        """Write the decoder's inputs, one of this process's samples at a time; `sources` names them by index."""
        entries_of_rank: dict[int, dict[str, Any]] = {}
        for (index, source), entry in zip(sources.items(), captured, strict=True):
            arguments, layout = pack(entry.arguments)
            tensors = {"modality": entry.modality, "positions": entry.positions, "hidden": entry.hidden, **arguments}
            if self._towers:
                tensors["served"] = entry.served
            path = sample_file(self.path, index)
            record = write_tensors_durably(path, tensors, {"arguments": layout})
            shape = {"states": list(entry.hidden.shape), "states_nbytes": entry.hidden.nbytes}
            entries_of_rank[index] = {"source": source, "process": self.processes.rank, **shape, **asdict(record)}
        sync_directory(self.path)
        entries = _united(self.processes.all_gather(entries_of_rank))
        manifest = {"settings": self.run_hash, "samples": [entries[index] for index in sorted(entries)], **self._towers}
        self.processes.broadcast(lambda: write_json_durably(self.path / SAMPLES_FILE, manifest))
        self.finished = 0

    def inputs(self, *, in_memory: bool) -> list[BlockInput]:
        """This process's samples as inputs of the first unfinished block.

        They are held in memory, or else read from disk at each use.
        """
        assert self.finished is not None
        separate = "towers" in _manifest(self.path / SAMPLES_FILE, self.run_hash)
        samples, rank = self._own_samples(), self.processes.rank
        shapes = [sample["states"] for sample in samples.values()]
        self._streams = {
            name: Stream(self.path, name, self.finished, list(samples), shapes, rank, separate=separate)
            for name in STREAMS
        }
        inputs: list[BlockInput] = []
        for index, sample in enumerate(samples):
            path = sample_file(self.path, sample)
            tokens = read_tensors(path, ("modality", "positions"))
            if in_memory:
                states = {name: stream.read(index) for name, stream in self._streams.items()}
                inputs.append(MemoryInput(**tokens, **states, arguments=read_arguments(path, self.device)))
            else:
                inputs.append(DiskInput(**tokens, index=index, path=path, streams=self._streams, device=self.device))
        return inputs

    def finish_block(self, result: BlockResult, inputs: Sequence[BlockInput]) -> None:
        """Keep a finished block and the hidden states before the next; a resumed run then starts there."""
        assert self.finished == result.index
        local_files: dict[str, FileRecord] = {}
        if self.processes.first:
            path = block_file(self.path, result.index)
            local_files[path.name] = write_tensors_durably(path, _packed(result))
        # A process without samples has no states.
        for name, stream in self._streams.items() if inputs else ():
            if not stream.writing:
                for index, entry in enumerate(inputs):
                    stream.write(index, getattr(entry, name))
            states, record = stream.finish()
            local_files[states.name] = record
        sync_directory(self.path)
        files = _united(self.processes.all_gather(local_files, [FileRecord]))

        def note() -> None:
            manifest = {
                "settings": self.run_hash,
                "inputs": hash_file(self._before(result.index)),
                "loss": result.loss,
                "layers": {name: asdict(layer.figures) for name, layer in result.layers.items()},
                "experts": {name: asdict(layer.figures) for name, layer in result.experts.items()},
                "attention": None if result.attention is None else asdict(result.attention),
                "files": {name: asdict(record) for name, record in files.items()},
            }
            write_json_durably(self._manifest_file(result.index), manifest)

        self.processes.broadcast(note)
        self.finished += 1
        for name in STREAMS:
            states_file(self.path, name, result.index, self.processes.rank).unlink(missing_ok=True)

    def figures(self) -> dict[str, LayerFigures]:
        """The figures of all finished layers, towers' first."""
        found: dict[str, LayerFigures] = {}
        towers = _manifest(self.path / SAMPLES_FILE, self.run_hash).get("towers")
        parts = [towers["layers"]] if towers else []
        parts += [_manifest(self._manifest_file(index), self.run_hash)["layers"] for index in range(self.finished or 0)]
        for part in parts:
            found |= {name: _figures(entry) for name, entry in part.items()}
        return found

    def experts(self) -> dict[str, ExpertsFigures]:
        """The figures of all finished lists of experts."""
        found = {}
        for index in range(self.finished or 0):
            for name, entry in _manifest(self._manifest_file(index), self.run_hash)["experts"].items():
                found[name] = ExpertsFigures(**{**entry, "input": _figures(entry["input"])})
        return found

    def attention(self) -> dict[int, AttentionRange]:
        """The ranges of the attention of all finished blocks that have one."""
        found = (
            _manifest(self._manifest_file(block), self.run_hash)["attention"] for block in range(self.finished or 0)
        )
        return {block: AttentionRange(**entry) for block, entry in enumerate(found) if entry is not None}

    def distributions(self) -> dict[str, dict[str, Tensor]]:
        """The kept distributions of all inputs."""
        distributions: dict[str, dict[str, Tensor]] = {}
        towers = self.path / TOWERS_FILE
        files = [towers] if towers.exists() else []
        for file in (*files, *(block_file(self.path, index) for index in range(self.finished or 0))):
            for name, value in read_tensors(file, prefix=_DISTRIBUTION).items():
                _, shared, key = name.split(" ", 2)
                distributions.setdefault(shared, {})[key] = value
        return distributions

    def tensor(self, block: int | None, layer: str, tensor: str) -> Tensor:
        """One tensor of a layer of the finished `block`; None means a tower."""
        file = self.path / TOWERS_FILE if block is None else block_file(self.path, block)
        # A header is long if a block has many experts, and the tensors of a block are asked for in a row.
        if self._reader is None or self._reader.path != file:
            self._reader = TensorReader(file)
        return self._reader.read(stored_name(layer, tensor))

    def modalities(self) -> dict[int, Tensor]:
        """The rows of the tokens of each of this process's samples, int32 [M], by index."""
        names = ("modality",)
        return {index: read_tensors(sample_file(self.path, index), names)["modality"] for index in self._own_samples()}

    def states_size(self) -> int:
        """Bytes of this process's samples in memory: both streams, and the blocks' other arguments."""
        return sum(sample["nbytes"] + sample["states_nbytes"] for sample in self._own_samples().values())

    def _own_samples(self) -> dict[int, dict[str, Any]]:
        """The manifest's entries of this process's samples, by index."""
        samples = enumerate(_manifest(self.path / SAMPLES_FILE, self.run_hash)["samples"])
        return {index: sample for index, sample in samples if sample["process"] == self.processes.rank}

    def note_export(self, directory: Path) -> None:
        """Note the complete checkpoint in `directory` before it is renamed into place."""
        write_json_durably(self.path / EXPORTED_FILE, self._export(directory))

    def was_exported_to(self, output: Path) -> bool:
        """Whether `output` is the checkpoint that this run made."""
        noted = self.path / EXPORTED_FILE
        if not noted.exists() or not all((output / name).is_file() for name in _IDENTIFYING):
            return False
        return read_manifest(noted) == self._export(output)

    def _export(self, directory: Path) -> dict[str, str]:
        return {"begun_with": self.fingerprint_hash, **{name: hash_file(directory / name) for name in _IDENTIFYING}}

    def _manifest_file(self, index: int) -> Path:
        return block_file(self.path, index).with_suffix(".json")

    def _before(self, index: int) -> Path:
        return self._manifest_file(index - 1) if index else self.path / SAMPLES_FILE

    def find_finished(self, blocks: int) -> None:
        """Check the files of a model of `blocks` blocks against their manifests, and set `finished`."""
        manifests = sorted(self.path.glob("block-*.json"))
        if not (self.path / SAMPLES_FILE).exists():
            if manifests:
                raise damaged(self.path / SAMPLES_FILE, "it is missing")
            return
        known = _manifest(self.path / SAMPLES_FILE, self.run_hash)
        if "towers" in known:
            towers = known["towers"]
            check_file(self.path / TOWERS_FILE, FileRecord(towers["nbytes"], towers["sha256"]))
        for index, sample in enumerate(known["samples"]):
            check_file(sample_file(self.path, index), FileRecord(sample["nbytes"], sample["sha256"]))
        for index, path in enumerate(manifests):
            if path != self._manifest_file(index):
                raise damaged(self._manifest_file(index), "it is missing")
            manifest = _manifest(path, self.run_hash)
            if manifest["inputs"] != hash_file(self._before(index)):
                raise damaged(path, "it does not follow from the manifest before it")
            # Only the newest hidden states are kept, and they are needed only while blocks are left.
            needed: list[str] = [block_file(self.path, index).name]
            if index == len(manifests) - 1 and len(manifests) < blocks:
                needed = list(manifest["files"])
            for name in needed:
                check_file(self.path / name, FileRecord(**manifest["files"][name]))
        self.finished = len(manifests)


def _united(parts: Iterable[Mapping[K, V]]) -> dict[K, V]:
    return {key: value for part in parts for key, value in part.items()}


def _figures(entry: dict[str, Any]) -> LayerFigures:
    """The figures of a manifest's entry."""
    rows = {row: RowChoice(**choice) for row, choice in entry.pop("modality_rows").items()}
    return LayerFigures(**entry, modality_rows=rows)


def _packed(result: BlockResult) -> dict[str, Tensor]:
    """A block's tensors by the names of a block file: as in the checkpoint, and its distributions."""
    linears = {name: layer.tensors for name, layer in result.layers.items()}
    for experts in result.experts.values():
        linears |= experts.tensors
    tensors = {
        stored_name(name, tensor): value.clone() for name, stored in linears.items() for tensor, value in stored.items()
    }
    tensors |= {
        f"{_DISTRIBUTION} {shared} {key}": value
        for shared, distribution in result.distributions.items()
        for key, value in distribution.items()
    }
    return tensors


def _manifest(path: Path, run_hash: str) -> dict[str, Any]:
    manifest = read_manifest(path)
    if manifest.get("settings") != run_hash:
        raise damaged(path, f"it belongs to another {RUN_FILE}")
    return manifest
