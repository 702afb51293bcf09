"""Linear attention in float32 inside the workers of several ranks: vLLM's `worker_extension_cls`.

Each worker is a process of its own, which imports this module before it builds its model.
"""

from __future__ import annotations

from tests.engine.linear_attention import CONVOLUTIONS, linear_attention

# For as long as the worker lives.
_PATCH = linear_attention(CONVOLUTIONS[0])
_PATCH.__enter__()


class Float32Workers:
    """What vLLM adds to its worker: nothing."""
