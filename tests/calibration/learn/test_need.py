"""Memory and operations of learning, from sizes alone."""

from calibration.learn.extent import EXTENTS, LONGEST
from calibration.learn.need import decoder_bytes, learning_bytes, learning_operations
from morphoquant_vllm.format.layers import LayerSpec

LAYERS = [LayerSpec(64, 32, 32, "column", "a"), LayerSpec(32, 64, 32, "row", "b")]
WEIGHTS, HEAD = 2 * 64 * 32, 1000


def test_operations_grow_with_the_tokens_until_they_suffice() -> None:
    enough = EXTENTS["best"].tokens
    few, more, most = (learning_operations(LAYERS, HEAD, tokens, "best") for tokens in (16, enough, 100 * enough))
    # 16 tokens teach four times and four judge, 19 times.
    assert few == WEIGHTS * (2 * 20 + 6 * 64 + 2 * 76) + 6 * HEAD * (64 + 76)
    assert few * enough / 16 > more == most
    # As many teach by default, and half as many judge.
    judged = EXTENTS["default"].judged_tokens
    by_default = learning_operations(LAYERS, HEAD, enough, "default")
    assert more - by_default == judged * (WEIGHTS * (2 + 2 * 19) + 6 * HEAD * 19)


def test_memory_is_that_of_the_largest_block_and_of_the_states() -> None:
    assert decoder_bytes(LAYERS) == 4 * WEIGHTS
    need = learning_bytes([LAYERS[:1], LAYERS], 1000, 10)
    assert need == 8 * WEIGHTS + 24 * 10 * (2 * (64 + 32)) + 1000
    assert learning_bytes([LAYERS], 0, 2 * LONGEST) == learning_bytes([LAYERS], 0, LONGEST)
