"""The formula of the memory that blocks with experts need."""

from pathlib import Path

from calibration.blocks.memory_need import memory_need
from calibration.model.architectures import find_architecture
from calibration.model.plan import decoder_names, plan
from calibration.model.source import TensorInfo
from calibration.settings.recipe import Recipe

CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
ARCHITECTURE = find_architecture(CONFIG)


def need(experts: int, tokens: int, inner: int = 768, ignore: tuple[str, ...] = ()) -> int:
    """Bytes of a block of the width of Qwen3-Omni."""
    shapes = {f"self_attn.{kind}_proj": (2048, 2048) for kind in "qkvo"}
    for expert in range(experts):
        shapes |= {f"mlp.experts.{expert}.{kind}_proj": (inner, 2048) for kind in ("gate", "up")}
        shapes[f"mlp.experts.{expert}.down_proj"] = (2048, inner)
    tensors = {f"model.layers.0.{name}.weight": TensorInfo(Path("f"), "BF16", shape) for name, shape in shapes.items()}
    recipe = Recipe(ignore=ignore)
    names, spec = decoder_names(ARCHITECTURE, CONFIG, tensors), plan(ARCHITECTURE, CONFIG, tensors, recipe)
    return memory_need(ARCHITECTURE, tensors, names, spec, recipe, tokens).block


def test_a_block_of_128_experts_fits_a_machine_of_24_gib() -> None:
    weights = 4 * 128 * 3 * 768 * 2048
    assert weights < need(128, 16384) < 24 * 2**30 / 3


def test_each_expert_adds_its_weights_twice_over_and_no_moments() -> None:
    one = 3 * 768 * 2048
    # So many that they need more than attention does.
    more = need(256, 4096) - need(192, 4096)
    # float32 weights of the 16-bit model; 4-bit tensors of the checkpoint, and as they are served; biases of rows.
    assert 64 * one * (4 + 2 * 0.5) < more < 64 * one * (4 + 2 * 0.65)


def test_ignored_experts_need_only_their_weights() -> None:
    assert need(256, 16384, ignore=("*.experts.*",)) < need(256, 16384)
