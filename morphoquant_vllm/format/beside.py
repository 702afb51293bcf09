"""Files beside the weights that a server reads: which they are, and whether they are those of the calibrated model.

Calibration copies them and a checkpoint lists them: both call `files_beside`. A server would take another vocabulary,
make an empty one, or pool another vector, without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.integrity import BESIDE_VERSION, FileDigest, file_digest
from morphoquant_vllm.format.pooling import module_files


def _pattern(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


# Token ids have no meaning without these. They are of transformers, sentencepiece, tiktoken and Mistral.
_VOCABULARY = _pattern(
    r"(tokenizer|added_tokens|tekken)\.json",
    r".*(vocab|merges)[^/]*\.(json|txt)",
    r"[^/]*\.(model|spm|tiktoken)(\.v\d+)?",
)
# These make a vector of hidden states: sentence-transformers' list of steps, its settings and the prefixes of texts.
_EMBEDDING = _pattern(
    r"(modules|config_sentence_transformers)\.json",
    r"sentence_(bert|roberta|distilbert|camembert|albert|xlm-roberta|xlnet)_config\.json",
)
# A list names these in the folders of such steps alone.
_OF_A_STEP = _pattern(r".+/[^/]+\.(json|safetensors)")
# A user may change these on purpose.
_SETTINGS = _pattern(
    r"(tokenizer_config|special_tokens_map|generation_config)\.json",
    r"chat_template\.(json|jinja)",
    r"((pre|post|video_?pre|image_?|audio_?|video_?)?processor)_config\.json",
)
# So may these, which lists of version 1 leave out: more settings, and the model's own code.
_MORE_SETTINGS = _pattern(
    r"(normalizer|feature_extractor_config|configuration)\.json",
    r"additional_chat_templates/[^/]+\.jinja",
    r"[^/]*\.py",
    # transformers refuses Qwen2.5-Omni without this file; it is copied, not opened.
    r"spk_dict\.pt",
)
# Terms that go with the weights. Nothing reads them, and a publisher may add them.
_TERMS = _pattern(r"(licen[sc]e|notice|use_policy|copying)[^/]*")

_KINDS = (_VOCABULARY, _EMBEDDING, _SETTINGS, _MORE_SETTINGS, _TERMS)


def files_beside(directory: Path) -> list[Path]:
    """Files of a model directory, relative to it, that belong beside its weights; links and FIFOs of such names, too.

    A directory of a training run holds many others. Hidden folders are left out.
    """
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [(Path(folder) / name).relative_to(directory) for name in sorted(names)]
    found = [path for path in paths if any(kind.fullmatch(path.as_posix()) for kind in _KINDS)]
    return found + [path for path in module_files(directory) if path not in found]


def digests_beside(directory: Path) -> dict[str, FileDigest]:
    """Size and SHA-256 of every such file in a directory, by its name with the folders before it."""
    names = sorted(path.as_posix() for path in files_beside(directory))
    return {name: _digest(directory / name) for name in names if (directory / name).is_file()}


def check_decisive(
    directory: Path, listed: Mapping[str, FileDigest], *, complete: bool = True, checksums: bool = True
) -> None:
    """Refuse a vocabulary, or steps of an embedding, that are not those of the list.

    Without `complete` their files may be missing.
    """
    for name in filter(_is_decisive, listed):
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


def changed_settings(
    directory: Path, listed: Mapping[str, FileDigest], version: int = BESIDE_VERSION, *, complete: bool = True
) -> list[str]:
    """Names of files that may change and are not those of the list or are missing, and of files outside the list.

    A list speaks of what its `version` covers. Without `complete` files may be missing. An empty list says
    nothing: an older checkpoint has none.
    """
    if not listed:
        return []
    now = {path.as_posix() for path in files_beside(directory) if (directory / path).is_file()}
    changed = [
        name
        for name in listed
        if not _is_decisive(name)
        if (complete and name not in now) or (name in now and _digest(directory / name) != listed[name])
    ]
    return sorted(changed + [name for name in now - listed.keys() if _is_covered(name, version)])


def _is_decisive(name: str) -> bool:
    """Whether a listed file decides what the served numbers mean, so that another one is refused."""
    return any(kind.fullmatch(name) for kind in (_VOCABULARY, _EMBEDDING, _OF_A_STEP))


def _is_covered(name: str, version: int) -> bool:
    """Whether a list of a version would name a file that is not of terms, had it been there."""
    if version < BESIDE_VERSION:
        return "/" not in name and any(kind.fullmatch(name) for kind in (_VOCABULARY, _SETTINGS))
    return not _TERMS.fullmatch(name)


def _digest(path: Path) -> FileDigest:
    try:
        return file_digest(path)
    except OSError as error:
        raise MorphoQuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
