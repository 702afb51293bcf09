"""Files beside the weights that decide what a model reads: vocabulary, chat template, processors.

A server would take another vocabulary, or make an empty one, without a word. Imports the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.integrity import FileDigest, file_digest

# Token ids have no meaning without these.
_VOCABULARY = re.compile(
    r"(tokenizer|added_tokens|tekken)\.json|.*(vocab|merges).*\.(json|txt)|.*\.(model|spm|tiktoken)(\.v\d+)?",
    re.IGNORECASE,
)
# A user may change these on purpose.
_SETTINGS = re.compile(
    r"(tokenizer_config|special_tokens_map|generation_config)\.json|chat_template\.(json|jinja)"
    r"|((pre|post|video_?pre|image_?|audio_?|video_?)?processor)_config\.json",
    re.IGNORECASE,
)


def digests_beside(directory: Path) -> dict[str, FileDigest]:
    """Size and SHA-256 of every such file in a directory, by name."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    return {name: _digest(directory / name) for name in names if _is_known(name)}


def check_vocabulary(
    directory: Path, listed: Mapping[str, FileDigest], *, complete: bool = True, checksums: bool = True
) -> None:
    """Refuse a vocabulary that is not the one of the list. Without `complete` its files may be missing."""
    for name in filter(_VOCABULARY.fullmatch, listed):
        path = directory / name
        if not path.is_file():
            # A FIFO or a folder is no file either.
            if complete or path.exists():
                raise MorphoQuantError(f"{path}: is missing or no file; copy it from the model that was calibrated")
        elif checksums and _digest(path) != listed[name]:
            raise MorphoQuantError(
                f"{path}: is not the file of the model that was calibrated (its SHA-256 is not the recorded one); copy "
                "it again"
            )


def changed_settings(directory: Path, listed: Mapping[str, FileDigest], *, complete: bool = True) -> list[str]:
    """Names of files of settings that are not those of the list or are missing, and of vocabulary files outside it.

    A new chat template counts, too. Without `complete` files may be missing. An empty list is that of an older
    checkpoint, and says nothing.
    """
    if not listed:
        return []
    now = {path.name for path in directory.iterdir() if path.is_file()}
    changed = [
        name
        for name in filter(_SETTINGS.fullmatch, listed)
        if (complete and name not in now) or (name in now and _digest(directory / name) != listed[name])
    ]
    added = [name for name in now - listed.keys() if _VOCABULARY.fullmatch(name) or name.startswith("chat_template.")]
    return sorted(changed + added)


def _is_known(name: str) -> bool:
    return bool(_VOCABULARY.fullmatch(name) or _SETTINGS.fullmatch(name))


def _digest(path: Path) -> FileDigest:
    try:
        return file_digest(path)
    except OSError as error:
        raise MorphoQuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
