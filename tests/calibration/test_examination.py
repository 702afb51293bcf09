"""The memory of a calibration as the doctor says it."""

import json
from pathlib import Path

import pytest

from calibration import examination
from calibration.blocks.memory_need import MemoryNeed
from morphoquant_vllm.doctor.finding import Finding
from tests.calibration.built_models import TinyModels


def only(directory: Path) -> Finding:
    (finding,) = examination.calibrating(directory)
    return finding


def test_a_16_bit_models_need_is_compared_with_the_free_memory(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    need, free = examination._need_and_free(model)
    # Python and torch at least, and two drawn values of float32 for each channel of the widest input.
    assert need.block > 3 * 2**28 + 65536 * 256 * 4 * 2 and free > 0

    def doctor(front: int, block: int, free: int) -> Finding:
        found = MemoryNeed(front=front, front_streamed=front, block=block), free
        monkeypatch.setattr(examination, "_need_and_free", lambda directory: found)
        return only(model)

    enough = doctor(2**29, 2**30, 2**31)
    assert enough.state == "ok" and "llama takes up to 1.00 GiB" in enough.text
    wide, large = doctor(2**29, 2**31, 2**30), doctor(2**31, 2**29, 2**30)
    assert wide.state == large.state == "note"
    # Each names what makes the larger of the two smaller.
    assert (
        wide.remedy == "calibrate with a smaller --sample-tokens" and large.remedy == "calibrate with --dtype bfloat16"
    )


def test_a_model_that_cannot_be_calibrated_is_a_note(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny.model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    finding = only(tmp_path)
    assert finding.state == "note" and "cannot be calibrated" in finding.text

    def lacks(directory: Path) -> tuple[MemoryNeed, int]:
        raise ModuleNotFoundError("none", name="psutil")

    monkeypatch.setattr(examination, "_need_and_free", lacks)
    assert "'psutil' is missing; run pip install '.[calibration]'" in only(tmp_path).remedy
