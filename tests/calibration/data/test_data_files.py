"""Reading the user's calibration data: accepted data, and one clear line for refused data."""

import base64
import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest

from calibration.data.conversations import Conversation, Media, Message, PlainText, Text
from calibration.data.data_files import load_conversations
from morphoquant_vllm.errors import MorphoQuantError


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def user(*parts: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def url(kind: str, value: str) -> dict[str, object]:
    return user({"type": kind, kind: {"url": value}})


GOOD = user({"type": "text", "text": "fine"})


def test_string_content_becomes_one_text_part(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    path = write_lines(tmp_path / "data.jsonl", line)
    messages = (Message("user", (Text("hi"),)), Message("assistant", (Text("ho"),)))
    assert load_conversations(path) == [Conversation(f"{path}:1", messages)]


def test_source_counts_blank_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", "", GOOD, "  ", GOOD)
    assert [item.source for item in load_conversations(str(path))] == [f"{path}:2", f"{path}:4"]


def test_media_parts_of_every_kind(tmp_path: Path) -> None:
    for name in ("a.png", "sub dir.wav", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    encoded = base64.b64encode(b"bytes").decode()
    absolute = tmp_path / "c.mp4"
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "audio_url", "audio_url": {"url": (tmp_path / "sub dir.wav").as_uri()}},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": str(absolute)}},
    ]
    (conversation,) = load_conversations(write_lines(tmp_path / "data.jsonl", user(*parts)))
    assert isinstance(conversation, Conversation)
    media = [part for part in conversation.messages[0].parts if isinstance(part, Media)]
    assert [(item.kind, item.content) for item in media] == [
        ("image", tmp_path / "a.png"),
        ("image", b"bytes"),
        ("audio", tmp_path / "sub dir.wav"),
        ("audio", b"bytes"),
        ("video", absolute),
    ]
    assert all(item.name.startswith(conversation.source) for item in media)


def test_text_files_directories_and_jsonl_mix_in_the_order_given(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "ignored.md").write_text("no")
    jsonl = write_lines(tmp_path / "data.jsonl", user({"type": "text", "text": "chat"}))
    items = load_conversations([folder, jsonl, folder / "a.txt"])
    assert [item.source for item in items] == [
        str(folder / "a.txt"),
        str(folder / "b.txt"),
        f"{jsonl}:1",
        str(folder / "a.txt"),
    ]
    assert items[0] == PlainText(str(folder / "a.txt"), "first")


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    jsonl, text = tmp_path / "data.jsonl", tmp_path / "data.txt"
    jsonl.write_bytes(b"\xef\xbb\xbf" + json.dumps(user({"type": "text", "text": "a"})).encode())
    text.write_bytes(b"\xef\xbb\xbfhello")
    assert len(load_conversations(jsonl)) == 1
    assert load_conversations(text) == [PlainText(str(text), "hello")]


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("{not json", "not JSON", "one JSON object per line"),
        ("[" * 200_000, "not JSON", "one JSON object per line"),
        ({"prompt": "x"}, "no 'messages'", '"messages"'),
        ([1], "no 'messages'", '"messages"'),
        ('{"messages": ' + "1" * 5000 + "}", "a number with too many digits", "as a string"),
        ({"messages": []}, "no messages", '"messages"'),
        ({"messages": ["hi"]}, "without a 'role'", '"role"'),
        ({"messages": [{"role": "user"}]}, "no 'content'", "string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "no 'content'", "string or a list"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "a call in 'tool_calls' names no function",
            "arguments",
        ),
        (
            user({"type": "smell"}),
            "unknown part type 'smell'",
            "text, image_url, audio_url, video_url, input",
        ),
        (user({"type": ["image"]}), "unknown part type ['image']", "image_url"),
        (user("bare"), "unknown part type None", "image_url"),
        (user({"type": "text"}), "without a 'text' string", "part types"),
        (user({"type": "text", "text": "\ud800"}), "half a surrogate pair", "valid Unicode"),
        (user({"type": "image_url", "image_url": "a.png"}), "no 'image_url' object", '"url"'),
        (url("image_url", "gone.png"), "gone.png does not exist", "relative to"),
        (url("image_url", "https://x.org/a.png"), "is remote", "download it first"),
        (url("video_url", "s3://bucket/a.mp4"), "is remote", "download it first"),
        (url("audio_url", "file://host/a.wav"), "another machine", "file:///"),
        (url("audio_url", "file://[x"), "file://[x is not a URL", "file:///"),
        (url("image_url", "iVBORw0KGgo" * 1000), "cannot be looked up (File name too long)", "data:<type>;base64,"),
        (url("image_url", "gone/" * 100), "gone/gone/", "relative to"),
        (url("image_url", "data:image/png,abc"), "not base64", ";base64,"),
        (url("image_url", "data:image/png;base64,@@"), "bad base64", "again"),
        (user({"type": "input_audio", "input_audio": {"data": "abc"}}), "bad base64", "again"),
        (
            user({"type": "input_audio", "input_audio": {"format": "wav"}}),
            "without a 'data' string",
            "part types",
        ),
    ],
)
def test_bad_line_is_one_message_with_file_line_and_remedy(
    tmp_path: Path, line: object, problem: str, remedy: str
) -> None:
    path = write_lines(tmp_path / "data.jsonl", GOOD, line)
    with pytest.raises(MorphoQuantError) as caught:
        load_conversations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and problem in message and remedy in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500


def test_jsonl_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(MorphoQuantError, match=r"data\.jsonl:2: not UTF-8 text; convert"):
        load_conversations(path)


def test_text_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"ok\nok\ncaf\xe9\n")
    with pytest.raises(MorphoQuantError, match=r"data\.txt:3: not UTF-8 text; convert"):
        load_conversations(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MorphoQuantError, match=name):
        load_conversations(tmp_path / name)


def test_missing_file_empty_directory_unknown_suffix_and_no_path(tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match=r"gone\.jsonl: no such calibration data"):
        load_conversations(tmp_path / "gone.jsonl")
    with pytest.raises(MorphoQuantError, match=r"no \.txt files in this directory; to use a \.jsonl"):
        load_conversations(tmp_path)
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(MorphoQuantError, match=r"data\.csv: unknown kind .*\.jsonl"):
        load_conversations(tmp_path / "data.csv")
    with pytest.raises(MorphoQuantError, match="no calibration data was given"):
        load_conversations([])


def test_conversations_with_missing_media_are_left_out_only_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data.jsonl"
    bad = [{"type": "image_url", "image_url": {"url": "gone.png"}}]
    broken = [{"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}]
    contents = ["one", bad, broken, "two"]
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": c}]}) + "\n" for c in contents))
    with pytest.raises(MorphoQuantError) as caught:
        load_conversations(path)
    assert str(caught.value).startswith(
        f"2 conversations cannot be used (the log lists the first 2; --skip-bad leaves them out); the first: {path}:2: "
    )
    assert re.findall(r"cannot be used: .*data.jsonl:(\d): (image_url file|bad base64)", caplog.text) == [
        ("2", "image_url file"),
        ("3", "bad base64"),
    ]
    with caplog.at_level(logging.WARNING, logger="calibration"):
        assert [item.source for item in load_conversations(path, skip_bad=True)] == [f"{path}:1", f"{path}:4"]
    assert re.findall(r"skipped: .*data.jsonl:(\d)", caplog.text) == ["2", "3"]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": bad}]}) + "\n")
    with pytest.raises(
        MorphoQuantError, match=r"none of its 1 conversations can be used; the first: .*gone.png does not exist"
    ):
        load_conversations(path, skip_bad=True)


def test_a_json_array_names_file_line_and_entry(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD, {"prompt": "x"}], indent=1))
    lines = path.read_text().splitlines()
    with pytest.raises(MorphoQuantError) as caught:
        load_conversations(path)
    line = next(number for number, text in enumerate(lines, start=1) if '"prompt"' in text) - 1
    assert str(caught.value).startswith(f"{path}:{line}, entry 3: no 'messages'")
    assert [item.source for item in load_conversations(path, skip_bad=True)] == [
        f"{path}:2, entry 1",
        f"{path}:{lines.index(' },') + 2}, entry 2",
    ]


def test_a_json_file_of_one_object_or_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(GOOD, indent=2))
    assert [item.source for item in load_conversations(path)] == [f"{path}:1"]
    write_lines(path, GOOD, GOOD)
    assert [item.source for item in load_conversations(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("text", ['[{"messages": []', "[1, 2", "[] tail", "[" * 200_000])
def test_a_broken_json_array_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(MorphoQuantError, match=r"data\.json.*(not JSON|no conversations)") as caught:
        load_conversations(path)
    assert "\n" not in str(caught.value)


def test_parquet_rows_are_records_without_nulls(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow, which is optional")
    rows = [
        {"messages": [{"role": "user", "content": "<image>what?", "name": None}], "images": [{"bytes": b"x"}]},
        {"messages": [{"role": "user", "content": "hello", "name": "ann"}], "images": None},
    ]
    path = tmp_path / "data.parquet"
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = load_conversations(path)
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.source == f"{path}:row 1"
    assert first.messages[0].parts == (Media("image", b"x", f"{path}:row 1: images"), Text("what?"))
    assert second.messages == (Message("user", (Text("hello"),), {"name": "ann"}),)
    path.write_bytes(b"PAR1 damaged")
    with pytest.raises(MorphoQuantError, match=r"data\.parquet: damaged or not parquet"):
        load_conversations(path)


def test_parquet_values_that_python_lacks_cost_one_row_or_none(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow, which is optional")
    from pyarrow import parquet

    spoken = [[{"role": "user", "content": text}] for text in ("one", "two")]
    far = arrow.array([3_000_000, 1], arrow.int32()).cast(arrow.date32())
    path = tmp_path / "data.parquet"
    # A column that nobody reads.
    parquet.write_table(arrow.table({"messages": spoken, "day": far}), path)
    assert len(load_conversations(path)) == 2
    # Two columns of one name, and a time zone that nobody knows.
    strange = arrow.array([1, 2], arrow.timestamp("s", tz="Nowhere/Land"))
    parquet.write_table(arrow.Table.from_arrays([arrow.array(spoken), strange, strange], ["messages", "t", "t"]), path)
    assert len(load_conversations(path)) == 2
    raw = arrow.array([b"\xff\xfe", b"fine"], arrow.binary())
    broken = arrow.Array.from_buffers(arrow.string(), 2, raw.buffers())
    parquet.write_table(arrow.table({"text": broken}), path)
    with pytest.raises(MorphoQuantError, match=r"data.parquet:row 1: 'text' cannot be read \(.*\); write it as UTF-8"):
        load_conversations(path)
    assert [item.source for item in load_conversations(path, skip_bad=True)] == [f"{path}:row 2"]


def test_parquet_without_pyarrow_names_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(MorphoQuantError, match=r"needs the package pyarrow; install it, or convert it to \.jsonl"):
        load_conversations(tmp_path / "data.parquet")


def test_keys_that_are_not_read_are_counted_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:;base64,eA==", "detail": "high"}, "cache_control": {}}
    lines = [
        {"id": 7, "messages": [{"role": "user", "content": "<audio>", "weight": 1}]},
        {"id": 8, "messages": [{"role": "user", "content": [part]}], "name": None},
    ]
    with caplog.at_level(logging.WARNING, logger="calibration"):
        load_conversations(write_lines(tmp_path / "data.jsonl", *lines))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith(
        "data.jsonl: not read, with the number of conversations: <audio> in a text, without audios (1), id (2), "
        "messages.content.cache_control (1), messages.content.image_url.detail (1), messages.weight (1)"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(MorphoQuantError, match=f"{name}: is not a regular file; give the data in one"):
        load_conversations(tmp_path / name)


def test_only_the_first_unusable_conversations_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "data.jsonl", *["{"] * 7, GOOD)
    with pytest.raises(
        MorphoQuantError, match=r"7 conversations cannot be used \(the log lists the first 5; .*skip-bad"
    ):
        load_conversations(path)
    assert re.findall(r"cannot be used: .*data.jsonl:(\d): not JSON", caplog.text) == ["1", "2", "3", "4", "5"]
    assert [item.source for item in load_conversations(path, skip_bad=True)] == [f"{path}:8"]
