"""Local copies read in their published layouts, and refused in others."""

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from benchmarks.omni_eval import air_bench, mmmu, scienceqa, video_mme
from benchmarks.omni_eval.__main__ import BENCHMARKS
from benchmarks.omni_eval.ask import content
from benchmarks.omni_eval.items import Media
from morphoquant_vllm.errors import MorphoQuantError
from tests.benchmarks.omni_eval.miniature import (
    WRITERS,
    write_air_bench,
    write_mmmu,
    write_scienceqa,
    write_video_mme,
)


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
    assert items[3].groups == {"subject": "social science", "modality": "text+image", "grade": "grade4"}


def test_mmmu_images_stand_where_the_text_has_them(tmp_path: Path) -> None:
    items = {item.id: item for item in mmmu.load(write_mmmu(tmp_path))}
    first, second = items["validation_Art_1"], items["validation_Art_2"]
    assert kinds(first.parts) == ["text", "image", "text"]
    assert first.parts[0] == "What does "
    assert str(first.parts[2]).startswith(" show?\n\n(A) A ramp\n(B) A wall\n\nAnswer with the option's letter")
    assert kinds(second.parts) == ["text", "image", "text", "image", "text"]
    assert str(second.parts[0]).endswith("(A) ")
    assert first.groups["subject"] == "Art" and items["validation_Math_1"].groups["subject"] == "Math"
    assert items["validation_Math_1"].choices == {} and items["validation_Math_1"].answers == ("84", "84.0 pixels")


def test_video_mme(tmp_path: Path) -> None:
    items = list(video_mme.load(write_video_mme(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["video", "text"]] * 3
    assert items[0].choices == {"A": "A square.", "B": "A circle.", "C": "A sound.", "D": "Nothing."}
    assert str(items[0].parts[1]).endswith("A. A square.\nB. A circle.\nC. A sound.\nD. Nothing.\nThe best answer is:")
    assert items[2].groups["duration"] == "long" and items[2].groups["subject"] == "Sports Competition"
    (video, text) = content(items[2])
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,") and text["type"] == "text"


def test_air_bench(tmp_path: Path) -> None:
    items = list(air_bench.load(write_air_bench(tmp_path)))
    assert [kinds(item.parts) for item in items] == [["audio", "text"]] * 3
    assert [len(item.choices) for item in items] == [4, 4, 2]
    assert [item.answers for item in items] == [("B",)] * 3
    (sound, _) = content(items[0])
    assert sound["type"] == "input_audio" and sound["input_audio"]["format"] == "wav"


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


def test_missing_media_are_named(tmp_path: Path) -> None:
    videos = write_video_mme(tmp_path / "v")
    (videos / "data" / "dEf_2.mp4").unlink()
    refused("video-mme", videos, "dEf_2.mp4", "expected the video of 002-1; found no such file")
    sounds = write_air_bench(tmp_path / "a")
    (sounds / "Foundation" / "Music_Genre_fma" / "0.wav").unlink()
    refused("air-bench", sounds, "0.wav", "expected the audio of entry 0; found no such file")


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
