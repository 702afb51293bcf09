"""A model as huggingface_hub keeps it on the disk: blobs by content, and links to them by revision."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(cache: Path, name: str, model: Path, change: Callable[[Path], None] | None = None) -> Path:
    """Put the files of `model`, after `change`, into a cache as repository `name`; the folder of its revision."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(shutil.copytree(model, Path(scratch) / "model"))
        if change is not None:
            change(files)
        for file in (path for path in files.iterdir() if path.is_file()):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
