"""The four benchmarks in their published layouts, a few questions each, with media."""

import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet

from tests.tiny_conversations import image_bytes, sound_bytes, write_video

IMAGE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])


def _write(path: Path, rows: list[dict[str, Any]], schema: arrow.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), path)


def _image(seed: int) -> dict[str, Any]:
    return {"bytes": image_bytes(seed), "path": "image.png"}


def write_scienceqa(directory: Path) -> Path:
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
    _write(directory / "data" / "test-00000-of-00001.parquet", rows, arrow.schema(list(fields.items())))
    return directory


def write_mmmu(directory: Path) -> Path:
    """Two subjects: a choice with an image in its text, one with an image as an option, and an open question."""
    columns = ("id", "question", "options", "answer", "question_type")
    fields = [(name, arrow.string()) for name in columns] + [(f"image_{number}", IMAGE) for number in range(1, 8)]

    def row(name: str, question: str, options: list[str], answer: str, *images: int) -> dict[str, Any]:
        kind = "multiple-choice" if options else "open"
        cells = dict(zip(columns, (name, question, repr(options), answer, kind), strict=True))
        return cells | {f"image_{number}": _image(seed) for number, seed in enumerate(images, start=1)}

    art = [
        row("validation_Art_1", "What does <image 1> show?", ["A ramp", "A wall"], "A", 1),
        row("validation_Art_2", "Which is red?", ["<image 1>", "<image 2>"], "B", 2, 3),
    ]
    maths = [row("validation_Math_1", "How tall is <image 1>?", [], "['84', '84.0 pixels']", 4)]
    for subject, rows in (("Art", art), ("Math", maths)):
        _write(directory / subject / "validation-00000-of-00001.parquet", rows, arrow.schema(fields))
    return directory


def write_video_mme(directory: Path) -> Path:
    """Three questions about two clips."""
    (directory / "data").mkdir(parents=True)
    for seed, name in enumerate(("aBc-1", "dEf_2")):
        write_video(directory / "data" / f"{name}.mp4", seed)
    rows = [
        {
            "videoID": ("aBc-1", "aBc-1", "dEf_2")[number],
            "question_id": f"00{number}-1",
            "duration": ("short", "short", "long")[number],
            "domain": ("Knowledge", "Knowledge", "Sports Competition")[number],
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
    """Three questions about three sounds, one with two choices only."""
    entries = []
    for number in range(3):
        task, data_set = ("Speech_Emotion", "meld") if number else ("Music_Genre", "fma")
        folder = directory / "Foundation" / f"{task}_{data_set}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.wav").write_bytes(sound_bytes(number, 0.5))
        entry = {"path": f"{number}.wav", "question": "What is heard?", "choice_a": "a tone", "choice_b": "a word"}
        entry |= {} if number == 2 else {"choice_c": "noise", "choice_d": "silence"}
        entries.append(
            {**entry, "answer_gt": "a word", "task_name": task, "dataset_name": data_set, "uniq_id": 7 * number}
        )
    (directory / "Foundation" / "Foundation_meta.json").write_text(json.dumps(entries))
    return directory


WRITERS = {"scienceqa": write_scienceqa, "mmmu": write_mmmu, "video-mme": write_video_mme, "air-bench": write_air_bench}
