"""The largest queries, keys and values of a block's attention, from which a server makes scales of its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from calibration.processes import Processes
from morphoquant_vllm.format.kv_cache import AttentionRange


class AttentionWatch(TorchFunctionMode):
    """While active, notes the largest magnitudes that torch's attention gets: keys after rotary, as a cache has them.

    Attention that a model writes out as products is not seen, as that of Gemma 2.
    """

    def __init__(self) -> None:
        super().__init__()
        # Query, key, value, float32 [3]; zeros before the first call.
        self.largest = torch.zeros(3)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args[:3]) :])]
            found = torch.stack([_largest(tensor) for tensor in given])
            self.largest = torch.maximum(self.largest, found.cpu())
        return func(*args, **kwargs)

    def range(self, processes: Processes) -> AttentionRange | None:
        """The magnitudes over all processes' samples; None if no attention was seen."""
        query, key, value = map(max, *processes.all_gather(self.largest.tolist()), [0.0] * 3)
        return AttentionRange(query, key, value) if key or value else None


def _largest(tensor: Tensor) -> Tensor:
    return tensor.detach().abs().amax().float() if tensor.numel() else torch.zeros((), device=tensor.device)
