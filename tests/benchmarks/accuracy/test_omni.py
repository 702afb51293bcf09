"""Divergence and log-loss of the right answers' tokens."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import omni
from benchmarks.models.tiny_omni.data.questions import Question


def log(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_predictions_are_right_answers_their_loss_and_the_divergence() -> None:
    asked = [Question("text", [], "7"), Question("image", [], "12"), Question("text", [], "3")]
    tokens = [[0, 2], [1], [2, 2]]
    own = [log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), log([[0.5, 0.4, 0.1]]), log([[0.2, 0.2, 0.6]] * 2)]
    reference = [log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), log([[0.5, 0.4, 0.1]]), log([[0.2, 0.2, 0.6]] * 2)]
    found = omni.predictions(asked, tokens, own, reference)
    assert found["right"] == {"text": [1, 1], "image": [0]}
    assert found["loss"]["text"] == pytest.approx([-math.log(0.5 * 0.8), -2 * math.log(0.6)])
    assert found["loss"]["image"] == pytest.approx([-math.log(0.4)])
    # Of the first question's two tokens the first is as in the reference.
    divergence = (0.4 * math.log(0.2 / 0.1) + 0.6 * math.log(0.6 / 0.8)) / 2
    assert found["divergence"]["text"] == pytest.approx([divergence, 0], abs=1e-6)
    assert found["divergence"]["image"] == pytest.approx([0], abs=1e-6)


def test_log_probs_of_16_bit_are_made_once_for_a_key(tmp_path: Path) -> None:
    made = [log([[0.5, 0.5], [0.25, 0.75]]), log([[1.0, 0.0]])]
    first = omni._kept(tmp_path, ["a"], lambda: made)
    again = omni._kept(tmp_path, ["a"], lambda: pytest.fail("made again"))
    assert all(map(torch.equal, first, made)) and all(map(torch.equal, again, made))
    assert torch.equal(omni._kept(tmp_path, ["b"], lambda: made[:1])[0], made[0])
