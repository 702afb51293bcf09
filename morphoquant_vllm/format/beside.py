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
    known = [name for name in names if _VOCABULARY.fullmatch(name) or _SETTINGS.fullmatch(name)]
    return {name: file_digest(directory / name) for name in known}


def check_vocabulary(
    directory: Path, listed: Mapping[str, FileDigest], *, complete: bool = True, checksums: bool = True
) -> None:
    """Refuse a vocabulary that is not the one of the list. Without `complete` its files may be missing."""
    for name, digest in listed.items():
        path = directory / name
        if not _VOCABULARY.fullmatch(name):
            continue
        if not path.exists():
            if complete:
                raise MorphoQuantError(f"{path}: is missing; copy it from the model that was calibrated")
        elif checksums and file_digest(path) != digest:
            raise MorphoQuantError(
                f"{path}: is not the file of the model that was calibrated (its SHA-256 is not the recorded one); copy "
                "it again"
            )


def changed_settings(directory: Path, listed: Mapping[str, FileDigest], *, complete: bool = True) -> list[str]:
    """Names of the files of settings that are not those of the list, or are missing, and of a new chat template.

    Without `complete` they may be missing. An empty list is that of an older checkpoint, and says nothing.
    """
    now = digests_beside(directory) if listed else {}
    named = [name for name in listed if _SETTINGS.fullmatch(name) and (complete or name in now)]
    changed = [name for name in named if now.get(name) != listed[name]]
    added = [name for name in now.keys() - listed.keys() if name.lower().startswith("chat_template.")]
    return sorted(changed + added)
