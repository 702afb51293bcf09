"""A tokenizer whose special tokens have the published ids: the real vocabulary is not at hand, its size and ids are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from benchmarks.models.tiny_omni.processor import ProcessorSettings, write_processor, write_tokenizer

# As in the published tokenizer: the first special token's id, and that of "user", which config.json names.
FIRST_SPECIAL = 151643
USER_ID = 872
# Characters of three UTF-8 bytes, each a token of its own here: text of them has as many distinct tokens as real text.
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 20_000)]
# The published processor: images of 4 to 16384 tokens, audio of at most 300 s.
_PROCESSOR = ProcessorSettings(patch_size=14, min_pixels=3136, max_pixels=12_845_056, audio_seconds=300)


def write_files(directory: Path, media: bool = True) -> dict[str, int]:
    """Write the tokenizer's files, with `media` the processor's too; return ids that speakers and generation need."""
    if media:
        write_processor(directory, "omni", _PROCESSOR)
    else:
        write_tokenizer(directory, "text")
    path = directory / "tokenizer.json"
    tokenizer = _with_published_ids(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {"im_start": ids["<|im_start|>"], "im_end": ids["<|im_end|>"], "end": ids["<|endoftext|>"]}


def _with_published_ids(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer (tokenizer.json as an object) with CHARACTERS as tokens, and filled up to the published ids."""
    special = [token["content"] for token in tokenizer["added_tokens"]]
    vocabulary = tokenizer["model"]["vocab"]
    ordinary = sorted(vocabulary.keys() - set(special), key=vocabulary.__getitem__)
    merges = tokenizer["model"]["merges"]
    for character in CHARACTERS:
        first, second, third = tuple(_byte_characters(character))
        pair = first + second
        if pair not in vocabulary:
            vocabulary[pair] = -1
            ordinary.append(pair)
            merges.append([first, second])
        ordinary.append(pair + third)
        merges.append([pair, third])
    # No merge leads to these: text never has them.
    ordinary += [f"<|unused-{number}|>" for number in range(FIRST_SPECIAL - len(ordinary))]
    place = ordinary.index("user")
    ordinary[USER_ID], ordinary[place] = ordinary[place], ordinary[USER_ID]
    tokenizer["model"]["vocab"] = {token: number for number, token in enumerate(ordinary)}
    for number, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = FIRST_SPECIAL + number
    return tokenizer


def _byte_characters(character: str) -> str:
    """A character's UTF-8 bytes as byte-level BPE spells them, one character each."""
    ((spelled, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
    return spelled
