"""Programmatic dependent launch, on NVIDIA from compute capability 9.0 on: a kernel starts while the one before ends.

The earlier kernel signals when the next one may start. The later kernel waits before it reads the earlier one's output.
Both functions do nothing without PDL, the constant of a kernel that is launched this way.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has reached this call."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible. Its output may not be read before."""
    if PDL:
        gdc_wait()
