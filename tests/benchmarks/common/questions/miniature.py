"""The benchmarks in their published layouts, a few questions each, with media."""

import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import soundfile
import yaml
from pyarrow import parquet

from benchmarks.common.questions.datasets.air_bench_chat import CATEGORIES
from tests.tiny_conversations import SAMPLING_RATE, image_bytes, sound, sound_bytes, write_video

IMAGE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
# In the tags of the published files.
SUBTITLES = """1
00:00:00,000 --> 00:00:00,300
<font color="white" size=".72c">Here is</font>

2
00:00:00,300 --> 00:00:00,900
<font color="white" size=".72c">the square,</font>

3
00:00:00,900 --> 00:00:02,000
<font color="white" size=".72c">watch it
move.</font>
"""


def _write(path: Path, rows: list[dict[str, Any]], schema: arrow.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), path)


def _image(seed: int) -> dict[str, Any]:
    return {"bytes": image_bytes(seed), "path": "image.png"}


def write_scienceqa(directory: Path, split: str = "test") -> Path:
    """Two questions with an image, two without."""
    rows = [
        {
            "image": _image(number) if number % 2 else None,
            "question": f"Question {number}?",
            "choices": ["Red.", "Green.", "Blue."][: 2 + number % 2],
            "answer": number % 2,
            "hint": "Look at the picture." if number == 1 else "",
            "task": "closed choice",
            "grade": "grade4",
            "subject": ("natural science", "social science")[number // 2],
        }
        for number in range(4)
    ]
    texts = {name: arrow.string() for name in ("question", "hint", "task", "grade", "subject")}
    fields = {"image": IMAGE, "choices": arrow.list_(arrow.string()), "answer": arrow.int8(), **texts}
    _write(directory / "data" / f"{split}-00000-of-00001.parquet", rows, arrow.schema(list(fields.items())))
    return directory


def write_scienceqa_json(directory: Path) -> Path:
    """The same in the authors' own layout: one question with an image, one without, and one of another split."""
    problems = {}
    for number, split in enumerate(("test", "test", "train")):
        problems[str(10 + number)] = {
            "question": f"Question {number}?",
            "choices": ["Red.", "Green."],
            "answer": number % 2,
            "hint": "" if number else "Look at the picture.",
            "image": None if number else "image.png",
            "task": "closed choice",
            "grade": f"grade{5 + 2 * number}",
            "subject": "language science",
            "split": split,
        }
    place = directory / "images" / "test" / "10" / "image.png"
    place.parent.mkdir(parents=True)
    place.write_bytes(image_bytes(0))
    (directory / "problems.json").write_text(json.dumps(problems))
    (directory / "pid_splits.json").write_text(json.dumps({"test": ["10", "11"], "train": ["12"]}))
    return directory


def write_mmmu(directory: Path, split: str = "validation") -> Path:
    """Two subjects: a choice with an image in its text, one with an image as an option, and an open question."""
    columns = ("id", "question", "options", "answer", "question_type")
    fields = [(name, arrow.string()) for name in columns] + [(f"image_{number}", IMAGE) for number in range(1, 8)]

    def row(name: str, question: str, options: list[str], answer: str, *images: int) -> dict[str, Any]:
        kind = "multiple-choice" if options else "open"
        cells = dict(zip(columns, (name, question, repr(options), answer, kind), strict=True))
        return cells | {f"image_{number}": _image(seed) for number, seed in enumerate(images, start=1)}

    art = [
        row(f"{split}_Art_1", "What does <image 1> show?", ["A ramp", "A wall"], "A", 1),
        row(f"{split}_Art_2", "Which is red?", ["<image 1>", "<image 2>"], "B", 2, 3),
    ]
    maths = [row(f"{split}_Math_1", "How tall is <image 1>?", [], "['84', '84.0 pixels']", 4)]
    subjects = {"Art": art, "Math": maths}
    for subject, rows in subjects.items():
        _write(directory / subject / f"{split}-00000-of-00001.parquet", rows, arrow.schema(fields))
    # The card as published tells `datasets` which columns are images, and which files are whose.
    features = [{"name": name, "dtype": "image" if kind == IMAGE else "string"} for name, kind in fields]
    splits = {name: [{"split": split, "path": f"{name}/{split}-*"}] for name in subjects}
    card = {
        "dataset_info": [{"config_name": name, "features": features} for name in subjects],
        "configs": [{"config_name": name, "data_files": files} for name, files in splits.items()],
    }
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return directory


def write_video_mme(directory: Path) -> Path:
    """Three questions about two clips of two seconds; the first clip has subtitles."""
    (directory / "data").mkdir(parents=True)
    for seed, name in enumerate(("aBc-1", "dEf_2")):
        write_video(directory / "data" / f"{name}.mp4", seed)
    (directory / "subtitle").mkdir()
    (directory / "subtitle" / "aBc-1.srt").write_text(SUBTITLES)
    rows = [
        {
            "videoID": ("aBc-1", "aBc-1", "dEf_2")[number],
            "question_id": f"00{number}-1",
            "duration": ("short", "short", "long")[number],
            "domain": ("Knowledge", "Knowledge", "Sports Competition")[number],
            "sub_category": "Astronomy",
            "task_type": "Counting Problem",
            "question": "What moves over the field?",
            "options": ["A. A square.", "B. A circle.", "C. A sound.", "D. Nothing."],
            "answer": "A",
        }
        for number in range(3)
    ]
    texts = {name: arrow.string() for name in rows[0]} | {"options": arrow.list_(arrow.string())}
    _write(directory / "videomme" / "test-00000-of-00001.parquet", rows, arrow.schema(list(texts.items())))
    return directory


def write_air_bench(directory: Path) -> Path:
    """Three questions about three sounds, one with two choices only, one whose file is FLAC though it is named WAV."""
    entries = []
    for number, (task, data_set) in enumerate((("Music_Genre", "fma"), ("Audio_Grounding", "x"), ("Emotion", "meld"))):
        folder = directory / "Foundation" / f"{task}_{data_set}"
        folder.mkdir(parents=True, exist_ok=True)
        if task == "Audio_Grounding":
            soundfile.write(folder / f"{number}.flac", sound(number, 0.5), SAMPLING_RATE)
        else:
            (folder / f"{number}.wav").write_bytes(sound_bytes(number, 0.5))
        entry = {"path": f"{number}.wav", "question": "What is heard?", "choice_a": "a tone", "choice_b": "a word"}
        entry |= {} if number == 2 else {"choice_c": "noise", "choice_d": "silence"}
        entries.append(
            {**entry, "answer_gt": "a word", "task_name": task, "dataset_name": data_set, "uniq_id": 7 * number}
        )
    (directory / "Foundation" / "Foundation_meta.json").write_text(json.dumps(entries))
    return directory


def write_air_bench_chat(directory: Path) -> Path:
    """One open question of each task."""
    entries = []
    for number, task in enumerate(CATEGORIES):
        folder = directory / "Chat" / f"{task}_x"
        folder.mkdir(parents=True)
        (folder / f"{number}.wav").write_bytes(sound_bytes(number, 0.5))
        entry = {"path": f"{number}.wav", "question": f"What is heard in {number}?", "answer_gt": "A rising tone."}
        entries.append({**entry, "meta_info": "A tone of {200} Hz.", "task_name": task, "dataset_name": "x"})
    (directory / "Chat" / "Chat_meta.json").write_text(json.dumps(entries))
    return directory


WRITERS = {
    "scienceqa": write_scienceqa,
    "mmmu": write_mmmu,
    "video-mme": write_video_mme,
    "air-bench": write_air_bench,
    "air-bench-chat": write_air_bench_chat,
}
