"""When log probabilities of two float32 runs of one model agree."""

from torch import Tensor

# vLLM and transformers, and the backends, sum in another order; in float32 that moves a log probability less than this.
LOGPROB_TOLERANCE = 1e-3
# But a value at a tie between two codes goes the other way. It moves its token, and those that attend to it, and can
# bring codes of later layers to the other side of a tie: up to 0.74 was seen on a random model. Few tokens move so.
# Wrong rows, weights or media move nearly every token.
TIED_TOLERANCE, TIED_SHARE = 1.0, 0.1
# A lead of the best token over the next one that a single such value does not undo.
DECIDED = 0.05


def assert_same_logprobs(found: Tensor, expected: Tensor) -> None:
    """Log probabilities of the same tokens in two runs, of one shape: equal but for ties."""
    assert found.shape == expected.shape
    gap = (found - expected).abs()
    moved = int((gap > LOGPROB_TOLERANCE).sum())
    assert moved <= max(1, TIED_SHARE * gap.numel()), (
        f"{moved} of {gap.numel()} lie apart, up to {float(gap.max()):.4f}"
    )
    assert float(gap.max()) <= TIED_TOLERANCE, f"a token lies {float(gap.max()):.4f} apart"
