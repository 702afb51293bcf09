from dataclasses import replace

import pytest

from benchmarks.calibrate.model.layouts import layout_config, text_config
from benchmarks.calibrate.timing.bound import Decoder, Work, block_work, cached_inputs, seconds

# Heads of 4 channels, q 8, k and v 4 each.
SMALL = Decoder(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3)


def test_the_inputs_of_a_block() -> None:
    assert SMALL.inputs() == {"qkv": (16, 8), "o": (8, 8), "gate_up": (32, 8), "down": (8, 16)}


def test_the_work_of_a_block_by_hand() -> None:
    work = block_work(SMALL, samples=2, tokens=5, drawn=6)
    # N K: 128 + 64 + 256 + 128 = 576; 10 tokens, 2 operations a multiply-add. Attention: 2 samples x 2 x 25 x 8.
    assert work.forwards == 2 * (2 * 10 * 576 + 2 * 2 * 25 * 8)
    # K^2: three times 64 and once 256.
    assert work.hessians == 2 * 6 * (3 * 64 + 256)
    assert work.factorisation == pytest.approx(4 / 3 * (3 * 512 + 4096))
    assert work.updates == 64 * (16 + 8 + 32) + 256 * 8


def test_the_work_of_experts_by_hand() -> None:
    decoder = replace(SMALL, head_dim=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
    assert decoder.inputs() == {"qkv": (8, 8), "o": (8, 4), "gate_up": (12, 8), "down": (8, 6)}
    work = block_work(decoder, samples=2, tokens=5, drawn=6)
    # N K: 64 + 32, and 96 + 48 for each of the two experts that see a token. Attention: 2 samples x 2 x 25 x 4.
    assert work.forwards == 2 * (2 * 10 * (96 + 2 * 144) + 2 * 2 * 25 * 4)
    assert work.hessians == 2 * 6 * (64 + 16 + 2 * (64 + 36))
    assert work.factorisation == pytest.approx(4 / 3 * (512 + 64 + 4 * (512 + 216)))
    assert work.updates == 8 * 64 + 8 * 16 + 4 * (12 * 64 + 8 * 36)


def test_seconds_take_each_part_at_its_rate() -> None:
    assert seconds(Work(forwards=30, hessians=10, factorisation=6, updates=4), products=20, fp32=5) == 4.0


def test_cached_inputs_are_two_streams() -> None:
    assert cached_inputs(SMALL, samples=2, tokens=5, itemsize=4) == 2 * 10 * 8 * 4


def test_the_3b_layout_is_read_from_its_config() -> None:
    decoder = Decoder.of(text_config(layout_config("3B")))
    assert (decoder.num_hidden_layers, decoder.head) == (36, 128)
    # The shapes that benchmarks.cpu_linear lists for the same model.
    assert decoder.inputs() == {
        "qkv": (2560, 2048),
        "o": (2048, 2048),
        "gate_up": (22016, 2048),
        "down": (2048, 11008),
    }
