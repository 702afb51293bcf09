"""Memory of records: zeros, large ones in large pages if the system has them."""

import re
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.host_memory import LARGE, move_to_large_pages, zero_bytes

SMAPS, ENABLED = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("count", [0, 1, LARGE - 1, LARGE, LARGE + 1])
def test_bytes_are_zero_and_can_be_written(count: int) -> None:
    made = zero_bytes(count)
    assert made.shape == (count,) and not made.any()
    made.fill_(7)
    assert int(made.sum()) == 7 * count
    # A second one is another place.
    assert not zero_bytes(count).any()


def test_a_large_block_asks_for_large_pages() -> None:
    if not SMAPS.is_file() or not ENABLED.is_file():
        pytest.skip("this kernel has no transparent large pages")
    made = zero_bytes(2 * LARGE)
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        first, last = (int(part, 16) for part in entry.split(" ", 1)[0].split("-"))
        if first <= made.data_ptr() < last:
            # "hg": madvise(MADV_HUGEPAGE) was called; "sh": shared memory, which does not obey it.
            flags = re.search(r"^VmFlags: (.*)$", entry, re.MULTILINE)[1].split()
            assert "hg" in flags and "sh" not in flags
            return
    raise AssertionError("the block is in no mapping")


def test_a_large_parameter_moves_and_a_small_one_stays() -> None:
    """Shape, dtype and attributes stay; the memory is new, and begins at a page."""
    for rows, moves in ((LARGE // 64, True), (LARGE // 64 - 1, False)):
        parameter = torch.nn.Parameter(torch.ones(rows, 32, dtype=torch.bfloat16), requires_grad=False)
        parameter.weight_loader = "kept"  # type: ignore[attr-defined]
        before = parameter.data_ptr()
        move_to_large_pages(parameter)
        assert parameter.shape == (rows, 32) and parameter.dtype is torch.bfloat16
        assert parameter.weight_loader == "kept"  # type: ignore[attr-defined]
        assert (parameter.data_ptr() != before) == moves
        parameter.data[-1, -1] = 3
        assert float(parameter[-1, -1]) == 3
        if moves:
            assert parameter.data_ptr() % 4096 == 0 and not bool(parameter[0].any())
