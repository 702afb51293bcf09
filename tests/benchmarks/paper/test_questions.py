"""Which questions are asked, and which media are held out for calibration."""

from pathlib import Path

from benchmarks.common.questions.items import Item, Media
from benchmarks.paper.questions import BENCHMARKS, asked, hold_out, media_name, spread
from tests.benchmarks.paper.published import options, write_published


def item(name: str, file: str) -> Item:
    return Item(name, (Media("audio", "wav", Path("/x") / file), "?"), {}, ("A",), {})


def count(name: str, directory: Path, *more: str, held_out: tuple[str, ...] = ()) -> int:
    return len(list(asked(BENCHMARKS[name], directory / "data", options(directory, *more), held_out)))


def test_every_benchmark_is_read_below_the_data_folder(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    assert {name: count(name, tmp_path) for name in BENCHMARKS} == {
        "scienceqa": 4,
        "mmmu": 3,
        "video-mme": 3,
        "air-bench": 3,
    }


def test_scienceqa_can_be_its_questions_with_an_image_alone(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    assert count("scienceqa", tmp_path, "--scienceqa", "image") == 2
    assert count("mmmu", tmp_path, "--scienceqa", "image") == 3


def test_no_question_about_held_out_media_is_asked(tmp_path: Path) -> None:
    write_published(tmp_path / "data")
    assert count("video-mme", tmp_path, held_out=("data/aBc-1.mp4",)) == 1
    assert count("air-bench", tmp_path, held_out=("Music_Genre_fma/0.wav",)) == 2


def test_media_are_named_with_their_folder_since_names_repeat() -> None:
    assert media_name(item("1", "Emotion_meld/0.wav")) != media_name(item("1", "Music_Genre_fma/0.wav"))
    assert media_name(Item("1", ("?", Media("image", "png", b"x")), {}, ("A",), {})) == ""


def test_one_question_of_each_file_is_held_out_and_half_of_the_files_at_most() -> None:
    items = [item(f"{file}-{number}", f"{file}.wav") for file in "abcdef" for number in range(3)]
    held = hold_out(items, 2, lambda item: True)
    assert [item.id for item in held] == ["a-0", "d-0"]
    assert len(hold_out(items, 100, lambda item: True)) == 3
    assert [item.id for item in hold_out(items, 100, lambda item: item.id == "e-0")] == ["e-0"]


def test_spread_takes_all_or_evenly_spaced_ones() -> None:
    assert spread("abc", 5) == ["a", "b", "c"]
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([], 3) == []
