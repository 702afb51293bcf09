"""Sizes of linears by the config."""

from pathlib import Path

from benchmarks.models.widths import linear_widths
from tests.tiny_models import build_tiny_llama, build_tiny_omni


def test_widths_are_those_of_the_decoder_alone(tmp_path: Path) -> None:
    text, omni = (linear_widths(build(tmp_path / build.__name__)) for build in (build_tiny_llama, build_tiny_omni))
    assert text["0.self_attn.q_proj"] == 128 and text["1.mlp.down_proj"] == 256
    assert text.keys() == omni.keys() and len(text) == 14
