"""A page is written whole, and its place is checked before the work."""

from pathlib import Path

import pytest

from calibration.output.page_file import check_page, write_page
from morphoquant_vllm.errors import MorphoQuantError


def test_a_page_is_not_replaced_unasked(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page(page, overwrite=False)
    assert not list(tmp_path.iterdir())
    write_page("1", page, overwrite=False)
    for write in (lambda: check_page(page, overwrite=False), lambda: write_page("2", page, overwrite=False)):
        with pytest.raises(MorphoQuantError, match="pass --overwrite"):
            write()
    assert page.read_text() == "1"
    check_page(page, overwrite=True)
    assert page.read_text() == "1"
    write_page("2", page, overwrite=True)
    assert page.read_text() == "2" and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("place", ["missing/page.html", "file/page.html", "p" * 246])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MorphoQuantError, match=r"cannot be written .*; choose another --output$"):
        check_page(tmp_path / place, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match="is a directory; name a file"):
        check_page(tmp_path, overwrite=True)
