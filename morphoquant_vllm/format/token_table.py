"""Maps token ids to rows by a checkpoint's placeholder ids, and checks these against model and tokenizer.

Imports torch and the standard library only: `morphoquant verify` checks a table without vLLM and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.files import read_json
from morphoquant_vllm.format.schema import ANY_ROW, TEXT_ROW, QuantizationSpec

# Keys in transformers' configs of the token that stands for a medium.
_MEDIA_KEY = re.compile(r"(image|video|audio)_token_(?:id|index)")
_REMEDY = "calibrate again from this model's own files"


def rows_of_ids(token_ids: Tensor, placeholder_token_ids: Mapping[str, Sequence[int]], rows: Sequence[str]) -> Tensor:
    """The row of each token, int32, shape and device of `token_ids`.

    `placeholder_token_ids` maps "image", "video" and "audio" to token ids; every other token is text. `rows` names the
    rows in order. A modality without a separate row gets row "any"; ValueError if that is missing too.
    """
    modality = torch.full_like(token_ids, _row(TEXT_ROW, rows), dtype=torch.int32)
    for name, ids in placeholder_token_ids.items():
        modality[torch.isin(token_ids, torch.tensor(ids, device=token_ids.device))] = _row(name, rows)
    return modality


def _row(name: str, rows: Sequence[str]) -> int:
    return rows.index(name if name in rows else ANY_ROW)


def row_table(spec: QuantizationSpec, vocabulary: int) -> Tensor:
    """Row of every token id, int32 [vocabulary + 1]; the last entry is 'any', for ids outside the vocabulary.

    Index it with `ids.clamp(-1, vocabulary)`: -1 is the last entry, too. Every placeholder id of the spec must be in
    the vocabulary.
    """
    table = rows_of_ids(torch.arange(vocabulary + 1), spec.placeholder_token_ids, spec.rows)
    table[vocabulary] = spec.any_row
    return table


def check_token_table(directory: Path, config: Mapping[str, Any], spec: QuantizationSpec) -> None:
    """Refuse placeholder ids that are not those of config.json, or that the tokenizer's files do not set apart.

    A checkpoint without placeholder ids is served with row 'any' for every token: there is nothing to get wrong. Raises
    MorphoQuantError naming the id.
    """
    if not spec.placeholder_token_ids:
        return
    row_of = {token: row for row, ids in spec.placeholder_token_ids.items() for token in ids}
    media: dict[int, set[str]] = {}
    for modality, token in _media_tokens(config):
        media.setdefault(token, set()).add(modality)
    for token, modalities in media.items():
        # If two media share a token, its row may be that of either.
        if row_of.get(token) not in {*modalities, "any"}:
            problem = f"has it under '{row_of[token]}'" if token in row_of else "does not have it"
            raise MorphoQuantError(
                f"{directory}: config.json has {'/'.join(sorted(modalities))} token {token}, but "
                f"quantization_config.placeholder_token_ids {problem}; {_REMEDY}"
            )
    added = added_token_ids(directory)
    for token, row in row_of.items():
        if added and token not in added:
            raise MorphoQuantError(
                f"{directory}: placeholder_token_ids has token {token} for {row}, but the tokenizer does not list it "
                f"as an added token; {_REMEDY}"
            )


def unlisted_media(taken: Iterable[str], config: Mapping[str, Any], spec: QuantizationSpec) -> list[str]:
    """Sorted modalities of `taken` whose tokens the table does not list: they would be served as text.

    A modality counts as listed if config.json gives it a token that the table lists under another row.
    """
    listed = {token for ids in spec.placeholder_token_ids.values() for token in ids}
    modalities = {row for row, ids in spec.placeholder_token_ids.items() if ids}
    modalities |= {modality for modality, token in _media_tokens(config) if token in listed}
    return sorted(set(taken) - modalities)


def _media_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every (modality, token id) that a config names, at any depth."""
    # A model with a talker: its config has other ids, and only the thinker is served.
    if isinstance(config.get("thinker_config"), Mapping):
        config = config["thinker_config"]
    for key, value in config.items():
        match = _MEDIA_KEY.fullmatch(str(key))  # in memory, keys may be numbers (id2label)
        if match and type(value) is int:
            yield match[1], value
        elif isinstance(value, Mapping) and key != "quantization_config":
            yield from _media_tokens(value)


def added_token_ids(directory: Path) -> set[int]:
    """Ids of the tokens added to the tokenizer's vocabulary; empty if its files list none."""
    ids: set[int] = set()
    fast = _optional(directory / "tokenizer.json").get("added_tokens", [])
    ids |= {entry["id"] for entry in _list(fast) if isinstance(entry, dict) and type(entry.get("id")) is int}
    slow = _optional(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    ids |= {int(token) for token in (slow if isinstance(slow, dict) else {}) if _is_id(token)}
    added = _optional(directory / "added_tokens.json").values()
    return ids | {token for token in added if type(token) is int}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_id(token: str) -> bool:
    # Python refuses to parse a number with thousands of digits.
    return token.isascii() and token.isdecimal() and len(token) < 20
