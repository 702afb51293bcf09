"""The integer linear layer against its definition, and the bound that other backends are held to."""

import pytest
import torch
from torch import Tensor

from morphoquant_vllm.format.layers import LayerSpec
from morphoquant_vllm.format.schema import QuantizationSpec
from morphoquant_vllm.numerics import weights
from morphoquant_vllm.numerics.activation import ActivationRecord, act_quant, activation_record, is_massive, token_rows
from morphoquant_vllm.numerics.linear import WeightRecord, group_sums, linear, matmul, output_bound, weight_record
from tests.checkpoints import random_group
from tests.records import activation_of, rank_part, weight_of

TOKENS, IN, OUT, ROWS = 11, 256, 24, 3
# One set of one interval that holds no token.
NEVER_MASSIVE = {
    "massive_channel": torch.zeros(1, 1, dtype=torch.int32),
    "massive_low": torch.ones(1, 1),
    "massive_high": -torch.ones(1, 1),
}


def random_layer(
    group_size: int, rows: int = ROWS, seed: int = 0
) -> tuple[WeightRecord, ActivationRecord, Tensor, Tensor]:
    """Records of a random layer, x [M, K] with outliers, and a modality row for each token."""
    generator = torch.Generator().manual_seed(seed)
    activation = activation_record(
        step=torch.rand(IN, generator=generator) + 0.1,
        channel_order=torch.randperm(IN, generator=generator).int(),
        mask=torch.rand(rows, IN, generator=generator) < 0.2,
        centre=torch.randn(rows, IN, generator=generator),
        gain=torch.rand(rows, generator=generator) + 0.5,
        **NEVER_MASSIVE,
    )
    codes = torch.randint(-8, 8, (OUT, IN), generator=generator, dtype=torch.int8)
    scale = (torch.rand(OUT, IN // group_size, generator=generator) * 0.1 + 0.01).bfloat16()
    weight = weight_record(weights.pack(codes), scale, torch.randn(1, rows, OUT, generator=generator))
    x = torch.randn(TOKENS, IN, generator=generator) * 3
    x[:, ::17] *= 30
    return weight, activation, x, torch.randint(rows, (TOKENS,), generator=generator, dtype=torch.int32)


def by_definition(
    codes: Tensor, modality: Tensor, weight: WeightRecord, gain: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The formula, group by group: integer sums in int64, the sum over groups in float64."""
    groups = weight.scale.shape[1]
    q = weights.unpack(weight.codes).long().view(OUT, groups, -1)
    grouped = codes.long().view(codes.shape[0], groups, -1)
    y = torch.zeros(codes.shape[0], OUT, dtype=torch.float64)
    for group in range(groups):
        y += weight.scale[:, group].double() * (grouped[:, group] @ q[:, group].T).double()
    rows = modality.long()
    y = gain.double()[rows, None] * y + weight.absorbed_bias.double()[rows]
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_is_the_definition(group_size: int, with_bias: bool) -> None:
    weight, activation, x, modality = random_layer(group_size)
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(9)) if with_bias else None
    codes = act_quant(x, modality, activation)
    ours = matmul(codes, modality, weight, activation.gain, bias)
    expected = by_definition(codes, modality, weight, activation.gain, bias)
    assert ours.dtype == torch.float64
    # float64 sums of 256 terms in another order: 256 * 2^-53 of the largest output.
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_quantizes_multiplies_and_casts(dtype: torch.dtype) -> None:
    weight, activation, x, modality = random_layer(64)
    x = x.to(dtype)
    y = linear(x, modality, weight, activation)
    codes = act_quant(x, modality, activation)
    assert y.dtype == dtype
    assert torch.equal(y, matmul(codes, modality, weight, activation.gain, None).to(dtype))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sums_are_the_integers(group_size: int) -> None:
    weight, activation, x, modality = random_layer(group_size)
    codes = act_quant(x * 40, modality, activation)  # up to the 8-bit limits
    assert codes.min() == -128
    q = weights.unpack(weight.codes).long().view(OUT, -1, group_size)
    expected = (codes.long().view(TOKENS, 1, -1, group_size) * q[None]).sum(-1)
    assert torch.equal(group_sums(codes, weight).long(), expected)


def test_group_sums_are_exact_at_their_largest() -> None:
    weight = weight_record(
        weights.pack(torch.full((1, 128), -8, dtype=torch.int8)), torch.ones(1, 1).bfloat16(), torch.zeros(1, 1, 1)
    )
    assert group_sums(torch.full((1, 128), -128, dtype=torch.int8), weight).item() == 128 * 8 * 128


def test_nothing_is_lost_where_codes_and_weights_lie_on_the_grid() -> None:
    """x = code * step + centre and W * step = q * scale, all exact in binary: linear() must equal x @ W.T."""
    generator = torch.Generator().manual_seed(4)
    step = 2.0 ** torch.randint(-3, 3, (IN,), generator=generator)
    centre = torch.randint(-20, 20, (1, IN), generator=generator).float()
    mask = torch.rand(1, IN, generator=generator) < 0.3
    limit = torch.where(mask[0], 127, 7)
    codes = (torch.rand(TOKENS, IN, generator=generator) * 2 * limit - limit).round()
    x = codes * step + centre
    q = torch.randint(-8, 8, (OUT, IN), generator=generator)
    q[:, ::32] = 7  # every group reaches its peak, so clipping never helps
    scale = 2.0 ** torch.randint(-4, 0, (OUT, IN // 32), generator=generator)
    permuted = q * scale.repeat_interleave(32, 1)
    order = torch.randperm(IN, generator=generator)
    weight = torch.empty(OUT, IN)
    weight[:, order] = permuted / step[order]
    q_found, scale_found = weights.quantize_int4(weights.absorb(weight, step)[:, order], torch.ones(IN), 32)
    record = weight_record(weights.pack(q_found), scale_found, weights.absorbed_bias(weight, centre))
    activation = activation_record(step, order.int(), mask, centre, torch.ones(1), **NEVER_MASSIVE)
    bias = torch.randint(-9, 9, (OUT,), generator=generator).float()
    y = linear(x, torch.zeros(TOKENS, dtype=torch.int32), record, activation, bias)
    assert torch.equal(y.double(), x.double() @ weight.double().T + bias.double())


def test_absorbed_bias_takes_the_centre_out_exactly() -> None:
    """A token that sits on the centre of its row has code 0 everywhere and gets W @ centre, from the full weights."""
    _, activation, _, _ = random_layer(32)
    generator = torch.Generator().manual_seed(6)
    full = torch.randn(OUT, IN, generator=generator)
    centre = torch.empty(ROWS, IN)
    centre[:, activation.channel_order.long()] = activation.centre
    codes, scale = weights.quantize_int4(full, torch.ones(IN), 32)
    weight = weight_record(weights.pack(codes), scale, weights.absorbed_bias(full, centre))
    y = linear(centre, torch.arange(ROWS, dtype=torch.int32), weight, activation)
    assert torch.equal(y, (centre.double() @ full.double().T).float())


def test_every_row_is_honoured_token_by_token() -> None:
    weight, activation, x, modality = random_layer(64)
    together = linear(x, modality, weight, activation)
    for token, row in enumerate(modality.tolist()):
        alone = linear(
            x[token : token + 1],
            torch.zeros(1, dtype=torch.int32),
            weight._replace(absorbed_bias=weight.absorbed_bias[row : row + 1]),
            ActivationRecord(*(field[row : row + 1] for field in activation[:4]), *activation[4:]),
        )
        # Matrix products of other heights may sum in another order: a float32 rounding of the same float64 value.
        assert torch.allclose(alone[0], together[token], rtol=2.0**-22)


def test_no_token() -> None:
    weight, activation, x, modality = random_layer(64)
    assert linear(x[:0], modality[:0], weight, activation).shape == (0, OUT)


# --- massive tokens and tensor-parallel ranks


def row_parallel_layer(blocks: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a row-parallel layer of `blocks` blocks, and its full weight [N, K]."""
    layer = LayerSpec(IN, OUT, 32, "row", "down")
    spec = QuantizationSpec(layers={"down": layer}, tensor_parallel=blocks)
    full = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed + 1))
    return random_group([full], layer, spec, torch.tensor(seed))[0], full


def over_ranks(x: Tensor, modality: Tensor, tensors: dict[str, Tensor], ranks: int) -> Tensor:
    """The sum over ranks, each computed from the rank's slice of K, float64 [M, N]."""
    total = torch.zeros(x.shape[0], OUT, dtype=torch.float64)
    for rank, part in enumerate(x.chunk(ranks, 1)):
        own = rank_part(tensors, rank, ranks)
        record = activation_of(own)
        rows = token_rows(part, modality, record)
        total += matmul(act_quant(part, rows, record), rows, weight_of(own), record.gain, None)
    return total


def tokens_by_set(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Random x [M, K] and which block's intervals hold each token, bool [M, B]."""
    x = torch.randn(300, IN, generator=torch.Generator().manual_seed(9))
    sets = zip(tensors["massive_channel"], tensors["massive_low"], tensors["massive_high"], strict=True)
    return x, torch.stack([is_massive(x, *(field[None] for field in each)) for each in sets], 1)


def rounding_of_constants(tensors: dict[str, Tensor]) -> float:
    """absorbed_bias is rounded to float32 in each block, and once more in the sum of a rank's blocks."""
    return float(tensors["absorbed_bias"].abs().sum(0).max()) * 2 * 2.0**-24


@pytest.mark.parametrize(("blocks", "ranks"), [(2, 2), (4, 2), (4, 4), (4, 1)])
def test_ranks_sum_to_the_whole_layer_where_they_agree_on_the_row(blocks: int, ranks: int) -> None:
    tensors, _ = row_parallel_layer(blocks)
    x, held = tokens_by_set(tensors)
    # Every rank must see the token alike: no set holds it, or each rank has one that does.
    seen = held.view(-1, ranks, blocks // ranks).any(-1)
    agreed = seen.all(1) | ~seen.any(1)
    assert 5 < int(seen[agreed].any(1).sum()) < int(agreed.sum()) - 5
    x = x[agreed]
    modality = torch.randint(5, x.shape[:1], generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    record, weight = activation_of(tensors), weight_of(tensors)
    rows = token_rows(x, modality, record)
    whole = matmul(act_quant(x, rows, record), rows, weight, record.gain, None)
    assert (over_ranks(x, modality, tensors, ranks) - whole).abs().max() <= rounding_of_constants(tensors)


def test_a_rank_that_alone_knows_a_token_uses_its_own_part_of_the_massive_row() -> None:
    """Each rank's own formula, written out: the row that its values say, and the constants of its own blocks."""
    tensors, _ = row_parallel_layer(blocks=2)
    x, held = tokens_by_set(tensors)
    assert int((held[:, 0] != held[:, 1]).sum()) > 20
    massive, modality = 5, torch.full(x.shape[:1], 4, dtype=torch.int32)
    q = weights.dequantize_weight(tensors["weight_codes"], tensors["weight_scale"]).double()
    expected = torch.zeros(x.shape[0], OUT, dtype=torch.float64)
    for token in range(x.shape[0]):
        for rank in range(2):
            row = massive if bool(held[token, rank]) else 4
            positions = slice(rank * IN // 2, (rank + 1) * IN // 2)
            channels = tensors["channel_order"][positions].long()
            inverse = 1 / (tensors["activation_step"] * tensors["gain"][row])
            scaled = ((x[token] - tensors["centre"][row]) * inverse)[channels].round()
            low, high = (torch.where(tensors["modality_mask"][row, channels], *pair) for pair in ((-128, -8), (127, 7)))
            codes = scaled.clamp(low, high).double()
            expected[token] += tensors["gain"][row].double() * (q[:, positions] @ codes)
            expected[token] += tensors["absorbed_bias"][rank, row].double()
    # float64 sums of 256 terms in another order.
    assert (over_ranks(x, modality, tensors, 2) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_token_on_the_centre_of_the_massive_row_gets_w_centre_exactly(ranks: int) -> None:
    tensors, full = row_parallel_layer(blocks=4)
    centre = tensors["centre"][-1]
    at_centre = centre[tensors["massive_channel"].long()]
    tensors["massive_low"], tensors["massive_high"] = at_centre - 0.1, at_centre + 0.1
    y = over_ranks(centre[None], torch.zeros(1, dtype=torch.int32), tensors, ranks)[0]
    expected = full.double() @ centre.double()
    assert (y - expected).abs().max() <= rounding_of_constants(tensors)
    ordinary = over_ranks(centre[None], torch.zeros(1, dtype=torch.int32), tensors | {"massive_low": at_centre + 1}, 1)
    assert (ordinary[0] - expected).abs().max() > 0.1, "the massive row is what makes it exact"


# --- the bound


def float32_backend(codes: Tensor, modality: Tensor, weight: WeightRecord, gain: Tensor, bias: Tensor | None) -> Tensor:
    """The steps of a kernel: integer group sums, everything after them in float32, groups from last to first."""
    sums = group_sums(codes, weight).float()
    y = torch.zeros(codes.shape[0], OUT)
    for group in reversed(range(sums.shape[2])):
        y += sums[:, :, group] * weight.scale[:, group].float()
    y = y * gain[modality.long(), None] + weight.absorbed_bias[modality.long()]
    return y if bias is None else y + bias


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bound_is_loose_enough_for_float32_sums(group_size: int, dtype: torch.dtype, with_bias: bool) -> None:
    for seed in range(5):
        weight, activation, x, modality = random_layer(group_size, seed=seed)
        bias = torch.randn(OUT, generator=torch.Generator().manual_seed(seed)) if with_bias else None
        codes = act_quant(x.to(dtype), modality, activation)
        expected = matmul(codes, modality, weight, activation.gain, bias).to(dtype)
        ours = float32_backend(codes, modality, weight, activation.gain, bias).to(dtype)
        bound = output_bound(codes, modality, weight, activation.gain, expected)
        assert ((ours.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("wrong", ["activation code", "weight code", "row"])
def test_bound_is_tight_enough_to_catch_one_wrong_code(group_size: int, wrong: str) -> None:
    weight, activation, x, modality = random_layer(group_size)
    codes = act_quant(x, modality, activation)
    expected = matmul(codes, modality, weight, activation.gain, None).float()
    if wrong == "activation code":
        codes_used, rows_used, weight_used = codes.clone(), modality, weight
        codes_used[:, 100] += torch.where(codes[:, 100] < 0, 1, -1).to(torch.int8)
    elif wrong == "weight code":
        changed = weights.unpack(weight.codes)
        changed[:, 100] += torch.where(changed[:, 100] < 0, 1, -1).to(torch.int8)
        codes_used, rows_used, weight_used = codes, modality, weight._replace(codes=weights.pack(changed))
    else:
        codes_used, rows_used, weight_used = codes, (modality + 1) % ROWS, weight
    ours = float32_backend(codes_used, rows_used, weight_used, activation.gain, None)
    caught = (ours.double() - expected.double()).abs() > output_bound(
        codes, modality, weight, activation.gain, expected
    )
    # A zero on the other side of the product hides a changed code: those outputs are rightly equal.
    if wrong == "activation code":
        matters = (weights.unpack(weight.codes)[:, 100] != 0).expand(TOKENS, OUT)
    elif wrong == "weight code":
        matters = (codes[:, 100] != 0)[:, None].expand(TOKENS, OUT)
    else:
        matters = torch.ones(TOKENS, OUT, dtype=torch.bool)
    assert matters.sum() > TOKENS * OUT // 2
    assert caught[matters].all()
