"""Which files a checkpoint has: those that are copied from a model's directory, and those that are written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError

# Files of a model directory that a server reads, by kind. A directory of a training run holds many others.
COPIED_FILES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Tokenizers: of transformers, sentencepiece, tiktoken and Mistral.
        r"(tokenizer|special_tokens_map|added_tokens|tokenizer_config|normalizer|tekken)\.json",
        r".*(vocab|merges)[^/]*\.(json|txt)",
        r"[^/]*\.(model|spm|tiktoken)(\.v\d+)?",
        # Processors, chat templates, settings of generation.
        r"(pre|post|video_?pre|image_?|audio_?|video_?)?processor_config\.json",
        r"(generation_config|feature_extractor_config|configuration)\.json",
        r"chat_template\.(json|jinja)",
        r"additional_chat_templates/[^/]+\.jinja",
        # The model's own code.
        r"[^/]*\.py",
        # transformers refuses Qwen2.5-Omni without this file; it is copied, not opened.
        r"spk_dict\.pt",
        # Terms that go with the weights.
        r"(licen[sc]e|notice|use_policy|copying)[^/]*",
    )
)
# Written beside them: config, index and report; weights; the model card; the kept distributions.
_WRITTEN = tuple(
    re.compile(pattern)
    for pattern in (
        r"(config|model\.safetensors\.index|morphoquant_calibration)\.json",
        r"[^/]*\.safetensors",
        r"README\.md",
        r"morphoquant_calibration/distributions\.safetensors",
    )
)

# What hubs, systems and Python leave in a folder; nobody misses it.
_LITTER = frozenset((".cache", ".gitattributes", ".DS_Store", "__pycache__"))


def copied_files(directory: Path) -> list[Path]:
    """Files of the source, relative to it, that are copied into a checkpoint byte for byte.

    MorphoQuantError naming one that is not a regular file.
    """
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [(Path(folder) / name).relative_to(directory) for name in sorted(names)]
    found = [path for path in paths if any(kind.fullmatch(path.as_posix()) for kind in COPIED_FILES)]
    for path in found:
        # A broken link has no size, and a FIFO no end.
        if not (directory / path).is_file():
            raise MorphoQuantError(f"{directory / path}: is not a regular file; download it again, or remove it")
    return found


def foreign_file(directory: Path) -> Path | None:
    """The first file below a checkpoint, relative to it, that neither calibration wrote nor a hub or system left."""
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if name not in _LITTER)
        for name in sorted(name for name in names if name not in _LITTER):
            path = (Path(folder) / name).relative_to(directory)
            if not any(kind.fullmatch(path.as_posix()) for kind in (*COPIED_FILES, *_WRITTEN)):
                return path
    return None
