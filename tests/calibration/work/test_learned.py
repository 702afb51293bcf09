"""The targets and the state of unfinished learning: they come back bit for bit, and damage is found."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.work.learned import STATE, keep_part, read_part
from morphoquant_vllm.errors import MorphoQuantError

TENSORS = {
    "change scale": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "counted 3": torch.tensor([True, False, True]),
    "done": torch.tensor(8.0, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}


def work_in(path: Path, run_hash: str = "a1b2") -> Any:
    return SimpleNamespace(path=path, run_hash=run_hash)


def same(found: dict[str, Tensor] | None) -> bool:
    return (
        found is not None and found.keys() == TENSORS.keys() and all(map(torch.equal, *map(ordered, (found, TENSORS))))
    )


def ordered(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]


def test_a_part_comes_back_and_is_that_of_its_run(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    assert read_part(work, STATE) is None
    keep_part(work, STATE, TENSORS)
    assert same(read_part(work, STATE))
    with pytest.raises(
        MorphoQuantError, match=r"learn-state\.safetensors: cannot be used \(it belongs to another run\)"
    ):
        read_part(work_in(tmp_path, "c3d4"), STATE)


def test_a_flipped_bit_of_any_byte_is_found_or_changes_nothing(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    keep_part(work, STATE, TENSORS)
    file = tmp_path / "learn-state.safetensors"
    kept = file.read_bytes()
    harmless = []
    for place in range(len(kept)):
        file.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        try:
            assert same(read_part(work, STATE))
            harmless.append(place)
        except MorphoQuantError as error:
            assert str(error).startswith(f"{file}: cannot be used") and "\n" not in str(error)
    # The words "format" and "pt" of safetensors, which nothing reads here.
    assert len(harmless) <= len("formatpt")
