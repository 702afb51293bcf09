"""Local copies read in their published layouts, and refused in others."""

import json
import zipfile
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from benchmarks.common.questions.ask import content
from benchmarks.common.questions.datasets import air_bench, air_bench_chat, mmmu, scienceqa, video_mme
from benchmarks.common.questions.items import Media, present
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.common.questions.miniature import (
    WRITERS,
    write_air_bench,
    write_air_bench_chat,
    write_mmmu,
    write_scienceqa,
    write_scienceqa_json,
    write_video_mme,
)

BENCHMARKS = {
    "scienceqa": scienceqa,
    "mmmu": mmmu,
    "video-mme": video_mme,
    "air-bench": air_bench,
    "air-bench-chat": air_bench_chat,
}


def kinds(parts: tuple[str | Media, ...]) -> list[str]:
    return [part.kind if isinstance(part, Media) else "text" for part in parts]


def test_scienceqa(tmp_path: Path) -> None:
    items = list(scienceqa.load(write_scienceqa(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["text"], ["image", "text"]] * 2
    assert items[1].parts[1] == (
        "Context: Look at the picture.\nQuestion 1?\nA. Red.\nB. Green.\nC. Blue.\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [item.answers for item in items] == [("A",), ("B",)] * 2
    assert items[3].groups == {
        "subject": "social science",
        "modality": "text+image",
        "context": "image",
        "grades": "1-6",
    }
    assert [item.groups["context"] for item in items[:2]] == ["none", "text and image"]


def test_scienceqa_in_the_authors_layout(tmp_path: Path) -> None:
    items = list(scienceqa.load(write_scienceqa_json(tmp_path)))
    assert [item.id for item in items] == ["10", "11"]
    assert [kinds(item.parts) for item in items] == [["image", "text"], ["text"]]
    assert [item.answers for item in items] == [("A",), ("B",)]
    assert [item.groups["grades"] for item in items] == ["1-6", "7-12"]
    (image, _) = content(items[0])
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert [item.id for item in scienceqa.load(tmp_path, "train")] == ["12"]
    with pytest.raises(MorphoQuantError, match="expected the split dev; found test, train"):
        list(scienceqa.load(tmp_path, "dev"))
    (tmp_path / "problems.json").write_text('{"10": {"question": "?"}}')
    refused("scienceqa", tmp_path, "expected image, choices, answer, hint, subject, grade of problem 10")
    (tmp_path / "pid_splits.json").unlink()
    refused("scienceqa", tmp_path, "expected pid_splits.json; found images, problems.json")


def test_mmmu_images_stand_where_the_text_has_them(tmp_path: Path) -> None:
    items = {item.id: item for item in mmmu.load(write_mmmu(tmp_path))}
    first, second = items["validation_Art_1"], items["validation_Art_2"]
    assert kinds(first.parts) == ["text", "image", "text"]
    assert first.parts[0] == "What does "
    assert str(first.parts[2]).startswith(" show?\n(A) A ramp\n(B) A wall\n\nAnswer with the option's letter")
    assert kinds(second.parts) == ["text", "image", "text", "image", "text"]
    assert str(second.parts[0]).endswith("(A) ")
    assert first.groups["subject"] == "Art" and first.groups["discipline"] == "Art and Design"
    assert items["validation_Math_1"].groups["discipline"] == "Science"
    assert items["validation_Math_1"].choices == {} and items["validation_Math_1"].answers == ("84", "84.0 pixels")


def test_video_mme(tmp_path: Path) -> None:
    items = list(video_mme.load(write_video_mme(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["video", "text"]] * 3
    assert items[0].choices == {"A": "A square.", "B": "A circle.", "C": "A sound.", "D": "Nothing."}
    assert str(items[0].parts[1]).endswith("A. A square.\nB. A circle.\nC. A sound.\nD. Nothing.\nThe best answer is:")
    assert items[2].groups["duration"] == "long" and items[2].groups["subject"] == "Sports Competition"
    assert items[2].groups["subcategory"] == "Astronomy" and "subtitles" not in items[2].groups
    (video, text) = content(items[2])
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,") and text["type"] == "text"


@pytest.mark.parametrize("folder", ["video", "videos/data", "videos"])
def test_videos_may_lie_where_other_tools_unpack_them(tmp_path: Path, folder: str) -> None:
    directory = write_video_mme(tmp_path)
    (directory / folder).mkdir(parents=True)
    (directory / "data" / "dEf_2.mp4").rename(directory / folder / "dEf_2.mp4")
    found = [item.parts[0].source for item in video_mme.load(directory)]  # type: ignore[union-attr]
    assert (
        found[2] == directory / folder / "dEf_2.mp4"
        and len(present(list(video_mme.load(directory)), "", skip=False)) == 3
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS")],
)
def test_files_without_their_content_are_missing(tmp_path: Path, content: bytes, reason: str) -> None:
    directory = write_video_mme(tmp_path)
    (directory / "data" / "dEf_2.mp4").write_bytes(content)
    items = list(video_mme.load(directory))
    with pytest.raises(MorphoQuantError, match=f"dEf_2.mp4: .* found {reason}.*1 of 3 questions lack one"):
        present(items, "Video-MME", skip=False)
    assert len(present(items, "Video-MME", skip=True)) == 2


def test_a_page_that_cannot_be_read_is_the_files_fault(tmp_path: Path) -> None:
    (path,) = (write_scienceqa(tmp_path) / "data").iterdir()
    content = bytearray(path.read_bytes())
    # Behind the magic bytes: the first page, not the footer.
    content[4:200] = bytes(196)
    path.write_bytes(content)
    refused("scienceqa", tmp_path, "expected whole pages")


def asked(directory: Path, subtitles: int | None) -> list[str]:
    return [str(item.parts[1]).split("\nSelect")[0] for item in video_mme.load(directory, subtitles=subtitles)]


def test_video_mme_with_subtitles(tmp_path: Path) -> None:
    directory = write_video_mme(tmp_path)
    heading = "This video's subtitles are listed below:"
    whole = f"{heading}\nHere is\nthe square,\nwatch it move."
    assert asked(directory, 0)[:2] == [whole] * 2
    # Frames at 0 and 2 s, at 0, 1 and 2 s; the last subtitle is over at 2 s.
    assert asked(directory, 2)[0] == f"{heading}\nHere is"
    assert asked(directory, 3)[0] == f"{heading}\nHere is\nwatch it move."
    # A video without subtitles is asked about as in the setting without them, and told apart.
    assert asked(directory, 3)[2] == asked(directory, None)[2]
    groups = [item.groups["subtitles"] for item in video_mme.load(directory, subtitles=3)]
    assert groups == ["with", "with", "none"]
    (directory / "subtitle" / "aBc-1.srt").write_text("no subtitles")
    with pytest.raises(MorphoQuantError, match=r"aBc-1.srt: not the layout of Video-MME: expected subtitles"):
        asked(directory, 3)
    (directory / "subtitle" / "aBc-1.srt").unlink()
    with pytest.raises(MorphoQuantError, match=r"expected subtitle/\*.srt; found an empty folder"):
        asked(directory, 3)


def test_a_video_is_read_from_its_archive(tmp_path: Path) -> None:
    directory = write_video_mme(tmp_path)
    videos = sorted((directory / "data").iterdir())
    contents = [video.read_bytes() for video in videos]
    with zipfile.ZipFile(directory / "videos_chunked_01.zip", "w") as archive:
        for video in videos:
            archive.write(video, f"data/{video.name}")
            video.unlink()
    items = present(list(video_mme.load(directory)), "Video-MME", skip=False)
    media = [part for item in items for part in item.parts if isinstance(part, Media)]
    assert [part.read() for part in media] == [contents[0], contents[0], contents[1]]
    # Subtitles are told at frames of the video, whose length the archive's member says.
    assert items == present(items, "Video-MME", skip=True) and len(asked(directory, 3)) == 3
    (directory / "videos_chunked_01.zip").write_text("cut")
    refused("video-mme", directory, "videos_chunked_01.zip", "expected a zip archive")


def test_video_mme_in_another_container(tmp_path: Path) -> None:
    directory = write_video_mme(tmp_path)
    (directory / "data" / "dEf_2.mp4").rename(directory / "data" / "dEf_2.mkv")
    (video, _) = content(list(video_mme.load(directory))[2])
    assert video["video_url"]["url"].startswith("data:video/x-matroska;base64,")


def test_air_bench(tmp_path: Path) -> None:
    items = list(air_bench.load(write_air_bench(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["audio", "text"]] * 3
    assert [len(item.choices) for item in items] == [4, 4, 2]
    assert [item.answers for item in items] == [("B",)] * 3
    assert str(items[2].parts[1]).endswith("What is heard?\nA. a tone\nB. a word\nC. None\nD. None")
    sounds = [content(item)[0]["input_audio"]["format"] for item in items]
    assert sounds == ["wav", "flac", "wav"]


def test_air_bench_chat(tmp_path: Path) -> None:
    items = list(air_bench_chat.load(write_air_bench_chat(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["audio", "text"]] * 8
    assert items[1].parts[1] == "What is heard in 1?" and items[1].answers == ("A rising tone.",)
    assert items[1].groups["subject"] == "speech" and items[1].groups["task"] == "speech_dialogue_QA"


def refused(name: str, directory: Path, *fragments: str) -> None:
    with pytest.raises(MorphoQuantError) as caught:
        list(BENCHMARKS[name].load(directory))
    message = str(caught.value)
    assert "\n" not in message
    for fragment in (*fragments, f"not the layout of {BENCHMARKS[name].NAME}: expected"):
        assert fragment in message, message


@pytest.mark.parametrize("name", list(WRITERS))
def test_another_folder_is_refused_with_what_was_expected_and_found(tmp_path: Path, name: str) -> None:
    refused(name, tmp_path / "none", "found no such folder")
    (tmp_path / "train.csv").write_text("")
    refused(name, tmp_path, "found train.csv")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.table({"question": ["?"], "label": [1]}), tmp_path / "data" / "test-0.parquet")
    refused("scienceqa", tmp_path, "expected columns image, question", "found columns question, label")
    (tmp_path / "data" / "test-0.parquet").write_text("no parquet")
    refused("scienceqa", tmp_path, "test-0.parquet", "expected a parquet file")


def test_missing_media_are_named_or_left_out(tmp_path: Path) -> None:
    items = list(air_bench.load(write_air_bench(tmp_path)))
    (tmp_path / "Foundation" / "Music_Genre_fma" / "0.wav").unlink()
    with pytest.raises(MorphoQuantError, match=r"0.wav: .*expected the audio of 0; found no such file \(1 of 3"):
        present(items, "AIR-Bench", skip=False)
    assert [item.id for item in present(items, "AIR-Bench", skip=True)] == ["1", "2"]


def test_answers_that_are_not_there_are_named(tmp_path: Path) -> None:
    directory = write_air_bench(tmp_path)
    meta = directory / "Foundation" / "Foundation_meta.json"
    entries = json.loads(meta.read_text())
    meta.write_text(json.dumps([entries[0], {**entries[1], "answer_gt": "a bell"}]))
    refused("air-bench", directory, "expected answer_gt of entry 1 among its choices; found 'a bell'")
    meta.write_text(json.dumps([{"path": "x.wav"}]))
    refused("air-bench", directory, "in entry 0; found path")
    meta.write_text("[")
    refused("air-bench", directory, "expected JSON")
    meta.write_text("{}")
    refused("air-bench", directory, "expected a list; found a dict")
