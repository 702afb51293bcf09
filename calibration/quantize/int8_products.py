"""Products of integer codes: exact, and several times faster than float32 if the CPU has instructions for them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def products(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right of codes int8 [tokens, left] and [tokens, right]: int32 [left, right].

    Without exact int8 products the result is float32. float32 sums are exact up to 2^24.
    """
    if left.device.type == "cpu" and has_exact_products():
        return torch._int_mm(left.T, right)
    return left.float().T @ right.float()


@functools.cache
def has_exact_products() -> bool:
    """Whether torch multiplies int8 matrices on this CPU exactly, and with instructions for it.

    x86 without VNNI adds pairs of products in 16 bits, which saturate. Other CPUs may have plain loops only.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX") or not torch.backends.mkldnn.is_available():
        return False
    largest = torch.tensor([-128, 127], dtype=torch.int8)
    left, right = (largest[torch.arange(count) % 2].repeat(256, 1) for count in (64, 96))
    return torch.equal(torch._int_mm(left.T, right), left.T.int() @ right.int())
