"""A small omni model, dense or with experts: exact answers, distance from 16 bit, and the right answer's log-loss.

All by kind of question. vLLM is asked for answers. An API gives no more than the likeliest tokens' log probabilities,
so the other two figures are those of transformers on the torch reference: the right answer's tokens are given, and each
is predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.accuracy.experts.errors import expert_errors
from benchmarks.accuracy.job import Job
from benchmarks.accuracy.methods import MOE_OMNI, OMNI
from benchmarks.accuracy.settings import EVALUATOR_VERSION, Settings
from benchmarks.common.files import digest, file_digest, write_atomically
from benchmarks.common.machine import versions
from benchmarks.models.decoder import load
from benchmarks.models.tiny_omni.data.questions import Question

# More than the calibration file has, so all of its conversations are used.
MAX_SAMPLES = 512
# The evaluation sets: answers of the engine; predictions of the right answers' tokens, and errors of experts, in this
# process.
QUESTIONS, TOKENS, EXPERT_ERRORS = "questions", "tokens", "expert-errors"
# Questions of each kind on which errors of experts are measured.
EXPERT_QUESTIONS = 20


def prepare(settings: Settings, benchmark: str = OMNI, progress: Callable[[str], None] = print) -> Job:
    """Train the model unless it exists, with lines to `progress`, and make the questions."""
    from transformers import AutoProcessor

    from benchmarks.models.tiny_omni.data.encoding import Encoder
    from benchmarks.models.tiny_omni.data.questions import calibration_file, test_questions
    from benchmarks.models.tiny_omni.evaluate import answer_log_probs
    from benchmarks.models.tiny_omni.train import TrainingSettings, experts_training, trained_model

    work = settings.omni_work
    work.mkdir(parents=True, exist_ok=True)
    training = experts_training if benchmark == MOE_OMNI else TrainingSettings
    model = settings.model or trained_model(work, settings=training(settings.seed), progress=progress)
    questions = test_questions(work, settings.questions, settings.seed)

    processor = AutoProcessor.from_pretrained(model)
    asked = questions_digest(questions)

    def log_probs(thinker: Any) -> list[Tensor]:
        return answer_log_probs(thinker, processor, questions, settings.batch_size)

    @cache
    def reference() -> list[Tensor]:
        key = [file_digest([model]), asked, EVALUATOR_VERSION, versions()]
        return _kept(settings.work / "references", key, lambda: log_probs(load(model)))

    def evaluate(thinker: Any, name: str) -> dict[str, Any]:
        if name == EXPERT_ERRORS:
            chosen, encoder = questions_of_each_kind(questions, EXPERT_QUESTIONS), Encoder(processor)
            batches = (encoder.batch(asked, with_answers=True) for asked in chosen)
            return {"lists": expert_errors(thinker, load(model), map(_inputs, batches))}
        tokens = right_tokens(processor.tokenizer, questions)
        return predictions(questions, tokens, log_probs(thinker), reference())

    evaluations = {QUESTIONS: asked, TOKENS: asked}
    if benchmark == MOE_OMNI:
        # A result is known by its set's hash: this one is made of the same questions.
        evaluations[EXPERT_ERRORS] = digest([asked, EXPERT_ERRORS, EXPERT_QUESTIONS])
    return Job(
        benchmark=benchmark,
        settings=settings,
        model=model,
        calibration=[calibration_file(work, settings.seed)],
        max_samples=MAX_SAMPLES,
        evaluations=evaluations,
        described=lambda name: {"work": str(work.resolve()), "questions": settings.questions, "seed": settings.seed},
        evaluate=evaluate,
        engine=(QUESTIONS,),
        process=tuple(name for name in evaluations if name != QUESTIONS),
    )


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def questions_of_each_kind(questions: Sequence[Question], count: int) -> list[list[Question]]:
    """The first `count` questions of each kind."""
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question)
    return [asked[:count] for asked in kinds.values()]


def _kept(directory: Path, key: Sequence[Any], make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `make` gives, made once for a key: the 16-bit model answers the same questions for every method."""
    path = directory / f"{digest(list(key))[:32]}.safetensors"
    if not path.is_file():
        made = make()
        lengths = torch.tensor([len(each) for each in made])
        write_atomically(path, save({"log_probs": torch.cat(made), "lengths": lengths}))
    stored = load_file(path)
    return list(stored["log_probs"].split(stored["lengths"].tolist()))


def right_tokens(tokenizer: Any, questions: Sequence[Any]) -> list[list[int]]:
    """Token ids of every right answer, the end of the turn with it."""
    return [tokenizer(q.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for q in questions]


def predictions(
    questions: Sequence[Any], tokens: Sequence[list[int]], log_probs: Sequence[Tensor], reference: Sequence[Tensor]
) -> dict[str, Any]:
    """By kind and question: "right", "loss" and "divergence", from log probabilities [answer's tokens, vocabulary].

    right: 1 if every token of the right answer is the likeliest, and greedy decoding so gives that answer, else 0.
    loss: negative log probability of the right answer, in nats. divergence: KL(reference || this) per token, in nats.
    """
    found: dict[str, dict[str, list[float]]] = {"right": {}, "loss": {}, "divergence": {}}
    for question, ids, own, other in zip(questions, tokens, log_probs, reference, strict=True):
        wanted = torch.tensor(ids)
        figures = {
            "right": int((own.argmax(-1) == wanted).all()),
            "loss": -float(own.gather(1, wanted[:, None]).sum()),
            "divergence": float((other.exp() * (other - own)).sum(-1).mean()),
        }
        for name, value in figures.items():
            found[name].setdefault(question.kind, []).append(value)
    return found


def outcome(questions: Sequence[Any], answers: Sequence[str]) -> dict[str, Any]:
    """Right (1) or not (0) for every question, by kind, as benchmarks.models.tiny_omni scores it."""
    from benchmarks.models.tiny_omni.evaluate import accuracy

    right: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.kind, []).append(accuracy([question], [answer])["all"][0])
    return {"right": right}


def questions_digest(questions: Sequence[Any]) -> str:
    """Hash of questions, with their media by content, so the place of the files does not matter."""
    return digest([[question.kind, _portable(question.messages), question.answer] for question in questions])


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _media_digest(part) if name == "url" else _portable(part) for name, part in value.items()}
    return [_portable(part) for part in value] if isinstance(value, list) else value


@cache
def _media_digest(url: str) -> str:
    content = url.encode() if url.startswith("data:") else Path(url.removeprefix("file://")).read_bytes()
    return hashlib.sha256(content).hexdigest()
