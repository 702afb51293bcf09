"""Opens a work directory: for one run at a time, with unchanged inputs, and without foreign files."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from calibration.output.staging import explain_write_errors
from calibration.processes import ONE, Processes
from calibration.work.directory import EXPORTED_FILE, RUN_FILE, SAMPLES_FILE, WorkDirectory
from calibration.work.durable_files import PARTIAL, damaged, hash_file, is_manifest, read_manifest, write_json_durably
from calibration.work.fingerprint import refuse_changes
from calibration.work.lock import LOCK_FILE, locked
from morphoquant_vllm.errors import MorphoQuantError

logger = logging.getLogger(__name__)

FORMAT = 1
# Removal order: a manifest goes before the files it describes, so a crash never leaves a manifest without its files.
_FILES = tuple(
    re.compile(rf"{pattern}({re.escape(PARTIAL)})?")
    for pattern in (
        r"block-\d+\.json",
        r"learned\.json",
        r"(learn-targets|learn-state|learned)\.safetensors",
        r"budgets\.json",
        r"samples\.json",
        r"towers\.safetensors",
        r"(block|sample|rendered|hidden|served|sensitivity|metrics)-\d+(-process\d+)?\.safetensors",
        r"run\.json",
        r"exported\.json",
    )
)


@contextmanager
def open_work(
    path: Path,
    fingerprint: Mapping[str, Any],
    device: torch.device,
    blocks: int,
    output: Path,
    *,
    restart: bool = False,
    processes: Processes = ONE,
) -> Iterator[WorkDirectory]:
    """Hold the work directory `path` for a run over `blocks` blocks that ends in `output`; create it if it is missing.

    `fingerprint` is the run's, as work.fingerprint makes it. Finished work in the directory must have the same
    fingerprint, or `restart` drops it. The directory is removed if nothing is finished when the run ends. With several
    processes the first one holds it for all; they leave the block together.

    Raises MorphoQuantError if another run holds the directory, or if it is not a work directory. Other settings or data
    than at its beginning raise it too, as do missing and damaged files. The directory then stays unchanged.
    """
    if not processes.first:
        work = WorkDirectory(path, device, processes=processes, **processes.broadcast(dict))
        with processes.failing_together():
            yield work
        return
    with _held(path, fingerprint, device, blocks, output, restart=restart) as work:
        work.processes = processes
        names = ("fingerprint_hash", "threads", "run_hash", "finished", "exported")
        processes.broadcast(lambda: {name: getattr(work, name) for name in names})
        with processes.failing_together():
            yield work


@contextmanager
def _held(
    path: Path, fingerprint: Mapping[str, Any], device: torch.device, blocks: int, output: Path, *, restart: bool
) -> Iterator[WorkDirectory]:
    with explain_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    foreign = _foreign_file(path)
    if foreign is not None:
        raise MorphoQuantError(
            f"{path}: holds {foreign} and is not a calibration's work directory; choose another --work"
        )
    with locked(path):
        _drop_files(path, partial_only=not restart)
        work = WorkDirectory(path, device, _hash(fingerprint), torch.get_num_threads())
        work.exported = work.was_exported_to(output)
        if not work.exported:
            _begin(work, fingerprint, blocks)
        if work.finished is not None:
            logger.info("%s: resuming after %d of %d blocks", path, work.finished, blocks)
        try:
            yield work
        finally:
            if path.exists():
                _drop_files(path, partial_only=True)
                if work.finished is None:
                    clear_work(path)


def clear_work(path: Path) -> None:
    """Remove a run's files, and the directory if it is then empty and can be removed; foreign files stay."""
    _drop_files(path)
    (path / LOCK_FILE).unlink(missing_ok=True)
    if not any(path.iterdir()):
        # A mount point, or a directory in one that this user cannot write, stays.
        with suppress(OSError):
            path.rmdir()


def _begin(work: WorkDirectory, fingerprint: Mapping[str, Any], blocks: int) -> None:
    """Resume finished work, or begin anew if there is none."""
    run = work.path / RUN_FILE
    manifests = list(work.path.glob("block-*.json"))
    if run.exists() and (manifests or (work.path / SAMPLES_FILE).exists()):
        begun = read_manifest(run)
        if begun.get("format") != FORMAT:
            raise damaged(run, f"format {begun.get('format')!r} is not {FORMAT}")
        refuse_changes(work.path, begun["begun_with"], fingerprint, len(manifests))
        work.threads = begun["threads"]
    else:
        _drop_files(work.path)
        write_json_durably(run, {"format": FORMAT, "threads": work.threads, "begun_with": fingerprint})
    work.run_hash = hash_file(run)
    work.find_finished(blocks)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _foreign_file(directory: Path) -> str | None:
    """The file that shows that a directory is not a calibration's; None if it is one, or is empty.

    The first file of a run is RUN_FILE, and EXPORTED_FILE is the last one. Others may use our names, too. So one of the
    files must be a manifest, even if it was changed since.
    """
    if (directory / RUN_FILE).exists():
        known = any(is_manifest(directory / name) for name in (RUN_FILE, SAMPLES_FILE))
        return None if known else RUN_FILE
    alone = {LOCK_FILE, RUN_FILE + PARTIAL, EXPORTED_FILE + PARTIAL}
    if is_manifest(directory / EXPORTED_FILE):
        alone.add(EXPORTED_FILE)
    return min((entry.name for entry in directory.iterdir() if entry.name not in alone), default=None)


def _drop_files(path: Path, *, partial_only: bool = False) -> None:
    for pattern in _FILES:
        for entry in sorted(path.iterdir()):
            if pattern.fullmatch(entry.name) and (entry.name.endswith(PARTIAL) or not partial_only):
                entry.unlink()
