"""Memory and operations of learning, from sizes alone."""

from calibration.learn.extent import EXTENTS, LONGEST
from calibration.learn.need import decoder_bytes, learning_bytes, learning_operations
from morphoquant_vllm.format.layers import LayerSpec

LAYERS = [LayerSpec(64, 32, 32, "column", "a"), LayerSpec(32, 64, 32, "row", "b")]
WEIGHTS, HEAD = 2 * 64 * 32, 1000


def test_operations_grow_with_the_tokens_until_they_suffice() -> None:
    enough = EXTENTS["best"].tokens
    few, more, most = (learning_operations(LAYERS, HEAD, tokens, "best") for tokens in (16, enough, 100 * enough))
    # 16 tokens teach twelve times and two judge, 51 times.
    assert few == WEIGHTS * (2 * 18 + 6 * 192 + 2 * 102) + 6 * HEAD * (192 + 102)
    assert few * enough / 16 > more == most
    # By default a third as many teach, and half as many judge, 19 times.
    taught, judged = enough // 3, EXTENTS["best"].judged_tokens // 2
    by_default = learning_operations(LAYERS, HEAD, enough, "default")
    assert by_default == taught * 8 * WEIGHTS + judged * WEIGHTS * (2 + 2 * 19) + 6 * HEAD * (taught + 19 * judged)


def test_memory_is_that_of_the_largest_block_and_of_the_states() -> None:
    assert decoder_bytes(LAYERS) == 4 * WEIGHTS
    need = learning_bytes([LAYERS[:1], LAYERS], 1000, 10)
    assert need == 8 * WEIGHTS + 24 * 10 * (2 * (64 + 32)) + 1000
    assert learning_bytes([LAYERS], 0, 2 * LONGEST) == learning_bytes([LAYERS], 0, LONGEST)
