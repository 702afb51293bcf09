"""Four public-domain texts of the Canterbury corpus, as the source distribution of Brotli 1.1.0 carries them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.files import write_atomically
from morphoquant_vllm.errors import MorphoQuantError

REQUIREMENT = "brotli==1.1.0"
FILES = {
    "alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
    "asyoulik.txt": "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
    "lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    "plrabn12.txt": "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
}


def fetch(directory: Path) -> Path:
    """Put the four files into `directory` unless they are there; MorphoQuantError if pip cannot get them."""
    if all(_is_right(directory / name) for name in FILES):
        return directory
    remedy = f"copy {', '.join(FILES)} of its tests/testdata into {directory}"
    with downloaded(REQUIREMENT, remedy) as path, tarfile.open(path) as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            content = archive.extractfile(member) if name in FILES else None
            if content is not None:
                write_atomically(directory / name, content.read())
    for name in FILES:
        if not _is_right(directory / name):
            raise MorphoQuantError(f"{directory / name}: not the text of {REQUIREMENT}; delete it and run again")
    return directory


@contextmanager
def downloaded(requirement: str, remedy: str) -> Iterator[Path]:
    """The source archive of a package while the block lasts; MorphoQuantError with the remedy if pip has none."""
    with tempfile.TemporaryDirectory() as temporary:
        arguments = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "-d", temporary]
        command = [sys.executable, "-m", "pip", "download", requirement, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = next(reversed(done.stderr.strip().splitlines()), "no message")
            raise MorphoQuantError(
                f"pip cannot download {requirement} ({reason}); connect to a package index, or {remedy}"
            )
        yield archives[0]


def _is_right(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[path.name]
