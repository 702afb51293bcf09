import pytest
import torch

from benchmarks.accuracy.baselines import activations, oracle
from benchmarks.accuracy.baselines.hadamard import hadamard, rotation, rotation_block
from morphoquant_vllm.errors import MorphoQuantError


def _heavy(tokens: int = 64, channels: int = 128) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 40
    return x


def _error(x: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((rounded - x).square().mean())


def test_finer_scales_lose_less() -> None:
    x = _heavy()
    x[0] *= 10
    static = activations.quantize(x, activations.scale_of(x.abs().max()))
    token, group = activations.per_token(x), activations.per_token_group(x, 32)
    assert _error(x, group) < _error(x, token) < _error(x, static)


@pytest.mark.parametrize("rounded", [activations.per_token, lambda x: activations.per_token_group(x, 64)])
def test_sixteen_codes_and_zero_tokens(rounded) -> None:
    x = _heavy()
    x[5] = 0.0
    result = rounded(x)
    assert bool((result[5] == 0).all())
    assert all(row.unique().numel() <= 32 for row in result)


def test_group_must_divide() -> None:
    with pytest.raises(MorphoQuantError, match="not divisible by activation group size 48"):
        activations.per_token_group(_heavy(), 48)


def test_smoothing_leaves_the_product_and_moves_the_outlier_into_the_weights() -> None:
    x, weight = _heavy(), torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    divisor = activations.smoothing(activations.channel_peak([x]), {"q": weight}, 0.5)
    # float32 sums over 128 terms as large as 40.
    torch.testing.assert_close((x / divisor) @ (weight * divisor).T, x @ weight.T, rtol=1e-4, atol=1e-3)
    spread = activations.channel_peak([x / divisor])
    assert float(spread.max() / spread.median()) < float(activations.channel_peak([x]).max()) / 3


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 64, 76, 128, 144, 256, 576, 896, 1536])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("order", [3, 6, 18])
def test_no_hadamard_matrix(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize(("in_features", "block"), [(576, 576), (128, 128), (96, 96), (72, 72), (66, 2)])
def test_rotation_is_orthogonal_and_spreads_outliers(in_features: int, block: int) -> None:
    assert rotation_block(in_features) == block
    matrix = rotation(in_features, seed=3)
    # Entries are 1/sqrt(K) in float32.
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(in_features), rtol=0, atol=1e-5)
    assert not torch.equal(matrix, rotation(in_features, seed=4))
    if block > 2:
        x = _heavy(channels=in_features)
        assert _error(x, activations.per_token(x @ matrix) @ matrix.T) < _error(x, activations.per_token(x)) / 2


def test_oracle_keeps_masked_outliers_and_counts_them() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    x[7, 2] = 60.0
    fitted = oracle.fit([x[:128], x[128:]], full_mask=False)
    rounded = fitted(x)
    assert bool(fitted.mask[2]) and int(fitted.mask.sum()) < 8
    assert float(rounded[7, 2]) == 60.0
    assert 0 < fitted.bypassed < 256 * int(fitted.mask.sum())
    assert fitted.total == x.numel()
    assert torch.equal(fitted.quantize(x), rounded)
    assert bool(oracle.fit([x], full_mask=True).mask.all())
