from pathlib import Path

import pytest

from benchmarks.calibrate.data import AUDIO_TOKENS, IMAGE_TOKENS, write_data
from benchmarks.calibrate.model.layouts import layout_config
from calibration.data.data_files import load_conversations
from calibration.data.rendering import build_samples
from calibration.model.architectures import find_architecture
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.schema import DEFAULT_ROWS


def test_every_sample_has_the_stated_number_of_tokens(model: Path, tmp_path: Path) -> None:
    tokens = 320
    files = write_data(tmp_path / "data", model, samples=3, tokens=tokens, media=1)
    config = layout_config("tiny")
    samples = build_samples(
        model,
        load_conversations(files),
        max_tokens=tokens,
        max_samples=3,
        window_tokens=tokens,
        placeholder_token_ids=find_architecture(config).placeholder_token_ids(config),
        rows=DEFAULT_ROWS,
    )
    assert [sample.modality.numel() for sample in samples] == [tokens] * 3
    counts = {row: int((samples[0].modality == number).sum()) for number, row in enumerate(DEFAULT_ROWS)}
    assert (counts["image"], counts["audio"]) == (IMAGE_TOKENS, AUDIO_TOKENS)
    # Windows of a text: no modality but text, and not the same twice.
    assert not bool(samples[1].modality.any())
    assert samples[1].inputs["input_ids"].tolist() != samples[2].inputs["input_ids"].tolist()


def test_samples_too_short_for_media_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MorphoQuantError, match=r"tokens = 200: an image, a sound and the chat template alone take 2"):
        write_data(tmp_path, model, samples=3, tokens=200, media=1)
    with pytest.raises(MorphoQuantError, match="media = 4: there are 3 samples"):
        write_data(tmp_path, model, samples=3, tokens=320, media=4)
