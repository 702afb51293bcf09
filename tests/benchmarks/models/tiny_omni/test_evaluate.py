"""Scoring, and that questions reach transformers and vLLM in the same form."""

import base64
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.models.tiny_omni import evaluate
from benchmarks.models.tiny_omni.data.questions import Question
from benchmarks.models.tiny_omni.evaluate import accuracy, standard_error, with_data_urls


def question(kind: str, answer: str) -> Question:
    return Question(kind, [{"role": "user", "content": [{"type": "text", "text": "?"}]}], answer)


def test_accuracy_counts_exact_answers_by_kind() -> None:
    asked = [question("text", "7"), question("image", "12"), question("text", "3"), question("image", "1")]
    counts = accuracy(asked, ["7", "1", " 3\n", "11"])
    assert counts == {"text": (2, 2), "image": (0, 2), "all": (2, 4)}
    assert list(counts)[-1] == "all"


def test_accuracy_refuses_missing_answers() -> None:
    with pytest.raises(ValueError):
        accuracy([question("text", "7")], [])


def test_standard_error() -> None:
    assert standard_error(95, 100) == pytest.approx(0.0218, abs=1e-4)
    assert standard_error(5, 5) == 0


def test_local_files_become_data_urls_and_questions_stay(tmp_path: Path) -> None:
    names = {"image_url": "a.png", "audio_url": "a.wav", "video_url": "a.mp4"}
    for name in names.values():
        (tmp_path / name).write_bytes(name.encode())
    content = [{"type": part, part: {"url": str(tmp_path / name)}} for part, name in names.items()]
    content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}})
    content.append({"type": "text", "text": "?"})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]
    sent = with_data_urls(messages)[0]["content"]
    for part, name, media in zip(sent, names.values(), ("image/png", "audio/", "video/mp4"), strict=False):
        url = part[part["type"]]["url"]
        assert url.startswith(f"data:{media}")
        assert base64.b64decode(url.split(",")[1]) == name.encode()
    assert sent[3:] == content[3:]
    assert content[0]["image_url"]["url"].endswith("a.png")


def test_vllm_is_asked_in_parts_and_answers_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setattr(evaluate, "ASKED_AT_ONCE", 2)
    sizes = []

    def chat(asked: list[list[dict[str, str]]], sampling: dict[str, int], use_tqdm: bool) -> list[SimpleNamespace]:
        sizes.append(len(asked))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=messages[0]["content"])]) for messages in asked]

    questions = [Question("text", [{"role": "user", "content": str(number)}], "") for number in range(5)]
    answers = evaluate.answers_vllm(SimpleNamespace(chat=chat), questions)
    assert answers == list("01234") and sizes == [2, 2, 1]
