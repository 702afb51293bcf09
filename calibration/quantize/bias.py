"""The bias of each set of tokens, which makes its mean output that of the 16-bit layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibration.processes import Processes
from calibration.quantize.chunks import chunks
from calibration.quantize.coded_tokens import CodedTokens
from calibration.quantize.moments import Moments, output_bias
from morphoquant_vllm.numerics import activation, weights


@dataclass(frozen=True)
class Means:
    """Means over each set of the tokens of all processes, float32 [sets, K] each, in channel order."""

    # Mean of codes times gain.
    code: Tensor
    # Mean of 16-bit values less the centre.
    value: Tensor


def find_means(
    moments: Moments, coded: CodedTokens, x: Tensor, x16: Tensor, massive: Tensor, processes: Processes
) -> Means:
    """Means of each set; x and x16 [local drawn, K] are in natural order, massive is bool [local drawn]."""
    code, value = moments.means()
    if not coded.sets.any_modality_only:
        # The row `any` may have to serve any token.
        ordinary = (~massive).nonzero().flatten()
        code[0], value[0] = means_in_any_row(coded, x, x16, ordinary, processes)
    return Means(code, value)


def find_bias(
    coded: CodedTokens, means: Means, matrix: Tensor, served: Tensor, blocks: int, *, any_massive: bool
) -> Tensor:
    """The bias of each block of K and set, float32 [blocks, sets, N], from the 16-bit and the served weights [N, K]."""
    bias = weights.absorbed_bias(matrix, coded.record.centre[coded.sets.row_of_set], blocks)
    bias += output_bias(means.code, means.value, matrix, served, blocks)
    if not any_massive:
        bias[:, -1] = bias[:, 0]
    return bias


def means_in_any_row(
    coded: CodedTokens, x: Tensor, x16: Tensor, chosen: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Means of codes and of values, [K] each, of the tokens `chosen` of x, as if the row `any` served all of them."""
    record, row, weight = coded.record, coded.sets.row_of_set[0], coded.weight[chosen]
    total = processes.all_reduce(weight.sum(), "SUM")
    code_mean, value_mean = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    for part, token_weight in zip(chunks(chosen, x.shape[1]), chunks(weight, x.shape[1]), strict=True):
        rows = row.int().expand(part.numel())
        codes = activation.act_quant(x[part], rows, record).float() * record.gain[rows.long()][:, None]
        code_mean += token_weight @ codes / total
        value_mean += token_weight @ (x16[part].index_select(1, coded.order) - record.centre[rows.long()]) / total
    return processes.all_reduce(code_mean, "SUM"), processes.all_reduce(value_mean, "SUM")
