"""When log probabilities of two float32 runs of one model agree."""

from torch import Tensor

# vLLM and transformers, and the backends, sum in another order; in float32 that moves a log probability less than this.
LOGPROB_TOLERANCE = 1e-3
# But a value at a tie between two codes goes the other way, and moves its token, and those that attend to it, by up to
# this. Few do. Wrong rows, weights or media move nearly every token, by tenths.
TIED_TOLERANCE, TIED_SHARE = 0.05, 0.1


def assert_same_logprobs(found: Tensor, expected: Tensor) -> None:
    """Log probabilities of the same tokens in two runs, of one shape: equal but for ties."""
    assert found.shape == expected.shape
    gap = (found - expected).abs()
    moved = int((gap > LOGPROB_TOLERANCE).sum())
    assert moved <= max(1, TIED_SHARE * gap.numel()), (
        f"{moved} of {gap.numel()} lie apart, up to {float(gap.max()):.4f}"
    )
    assert float(gap.max()) <= TIED_TOLERANCE, f"a token lies {float(gap.max()):.4f} apart"
