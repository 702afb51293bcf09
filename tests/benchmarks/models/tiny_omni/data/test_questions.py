"""Questions of the omni benchmark: deterministic, disjoint from training, right by construction."""

import json
from dataclasses import replace
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.models.tiny_omni.data import pool, questions, speech
from calibration.data.conversations import Media
from calibration.data.data_files import load_conversations
from morphoquant_vllm.errors import MorphoQuantError


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of the real digits and voices with a handful of media each, none of them spoken."""

    def write_silence(path: Path, digit: int, voices: speech.Voices, generator: np.random.Generator) -> None:
        path.write_bytes(b"")

    small = {name: replace(split, pictures=12, sounds=20, clips=6) for name, split in pool.SPLITS.items()}
    monkeypatch.setattr(pool, "SPLITS", small)
    monkeypatch.setattr(speech, "require_espeak", lambda: "espeak-ng")
    monkeypatch.setattr(speech, "write_spoken", write_silence)


def files(asked: list[questions.Question]) -> set[str]:
    parts = [part for question in asked for part in question.messages[0]["content"]]
    return {part[part["type"]]["url"] for part in parts if part["type"] != "text"}


def text_of(question: questions.Question) -> str:
    return str(question.messages[0]["content"][-1]["text"])


def test_same_seed_same_questions(tmp_path: Path, small_splits: None) -> None:
    asked = questions.test_questions(tmp_path, 5)
    assert [question.kind for question in asked] == [kind for kind in questions.KINDS for _ in range(5)]
    assert questions.test_questions(tmp_path, 5) == asked
    assert questions.test_questions(tmp_path, 5, seed=1) != asked
    # A longer test starts with the same questions of each kind.
    assert [q for q in questions.test_questions(tmp_path, 8) if q.kind == "audio"][:5] == asked[10:15]


def test_media_are_the_same_in_another_folder(tmp_path: Path, small_splits: None) -> None:
    first, second = (pool.media_pool(tmp_path / name, "test") for name in ("one", "other"))
    for kind in ("pictures", "clips"):
        pairs = zip(getattr(first, kind), getattr(second, kind), strict=True)
        for (digits, path), (again, other) in pairs:
            assert digits == again
            assert path.read_bytes() == other.read_bytes()


def test_splits_share_no_digit_voice_or_list() -> None:
    ranges = [range(*split.written) for split in pool.SPLITS.values()]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == 1797
    test, others = pool.SPLITS["test"].voices, [pool.SPLITS[name].voices for name in ("train", "calibration")]
    for voices in others:
        assert not set(test.variants) & set(voices.variants)
        assert not set(test.speeds) & set(voices.speeds)
        assert not set(test.pitches) & set(voices.pitches)
    empty = pool.Pool([], [], [])
    texts = {}
    for split in pool.SPLITS:
        stream = questions.question_stream(empty, split, "text", np.random.default_rng(0))
        texts[split] = {text_of(question).split()[-1] for question in islice(stream, 300)}
    assert not texts["test"] & texts["train"]
    assert not texts["calibration"] & (texts["train"] | texts["test"])


def test_questions_of_splits_share_no_file(tmp_path: Path, small_splits: None) -> None:
    calibration = questions._questions(tmp_path, "calibration", 5, 0)
    assert files(calibration) and not files(calibration) & files(questions.test_questions(tmp_path, 5))


def test_answers_are_right_by_construction() -> None:
    drawn = pool.Pool(
        pictures=[(7, Path("/p7.png"))], sounds=[(8, Path("/s8.wav"))], clips=[((3, 5), Path("/c35.mp4"))]
    )
    for kind in questions.KINDS:
        asked = list(islice(questions.question_stream(drawn, "test", kind, np.random.default_rng(0)), 40))
        for question in asked:
            text, answer = text_of(question), int(question.answer)
            if kind == "text":
                which, listed = text.split()[0].lower(), [int(digit) for digit in text[:-1].split()[-1].split(",")]
                ordered = sorted(listed)
                expected = {
                    "first": listed[0],
                    "second": listed[1],
                    "last": listed[2],
                    "largest": ordered[-1],
                    "smallest": ordered[0],
                }
                assert answer == expected[which]
            elif kind == "video":
                assert answer == (3 if text.startswith("First") else 5)
            elif kind == "image+text":
                assert answer == 7 + int(text[:-1].split()[-1])
            else:
                assert answer == {"image": 7, "audio": 8, "image+audio": 15, "video+audio": 13}[kind]
        assert len({text_of(question) for question in asked}) > (1 if kind in ("text", "video", "image+text") else 0)


def test_every_split_has_lists_for_its_questions() -> None:
    splits = [questions._list_split(listed) for listed in permutations(range(10), questions.LIST_LENGTH)]
    assert set(splits) == set(pool.SPLITS)
    # Each list can be asked about in five ways: enough for 300 different questions, nearly.
    assert min(splits.count(name) for name in pool.SPLITS) * len(questions._LIST_QUESTIONS) > 400


def test_every_medium_is_used_before_one_is_used_again() -> None:
    drawn = pool.Pool([(digit, Path(f"/{digit}.png")) for digit in range(10)], [], [])
    stream = questions.question_stream(drawn, "test", "image", np.random.default_rng(0))
    assert len(files(list(islice(stream, 10)))) == 10


def test_calibration_file_is_what_calibrate_reads(tmp_path: Path, small_splits: None) -> None:
    path = questions.calibration_file(tmp_path)
    lines = path.read_text().splitlines()
    assert len(lines) == questions.CALIBRATION_PER_KIND * len(questions.KINDS)
    assert not any(str(tmp_path) in line for line in lines)
    conversations = load_conversations(path)
    assert {message.role for entry in conversations for message in entry.messages} == {"user", "assistant"}
    media = [p for entry in conversations for m in entry.messages for p in m.parts if isinstance(p, Media)]
    assert {item.kind for item in media} == {"image", "audio", "video"}
    before = path.read_bytes()
    assert questions.calibration_file(tmp_path) == path
    assert path.read_bytes() == before
    assert questions.calibration_file(tmp_path, seed=1) != path


def test_missing_espeak_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech.shutil, "which", lambda command: None)
    with pytest.raises(MorphoQuantError, match=r"apt-get install espeak-ng$"):
        questions.test_questions(tmp_path)
    assert not list(tmp_path.iterdir())


def test_interrupted_media_are_not_taken_for_whole(
    tmp_path: Path, small_splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pool.digits, "write_clip", fail)
        with pytest.raises(KeyboardInterrupt):
            pool.media_pool(tmp_path, "test")
    assert not list(tmp_path.iterdir())
    assert len(pool.media_pool(tmp_path, "test").clips) == 6


def test_all_texts_cover_every_question() -> None:
    drawn = pool.Pool([(7, Path("/p.png"))], [(8, Path("/s.wav"))], [((3, 5), Path("/c.mp4"))])
    known = {"".join(char for char in text if not char.isdigit()) for text in questions.all_texts()}
    for kind in questions.KINDS:
        for question in islice(questions.question_stream(drawn, "train", kind, np.random.default_rng(0)), 30):
            assert "".join(char for char in text_of(question) if not char.isdigit()) in known
            assert json.loads(json.dumps(question.messages)) == question.messages
