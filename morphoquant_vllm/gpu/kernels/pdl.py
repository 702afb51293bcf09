"""Programmatic dependent launch, on NVIDIA from compute capability 9.0 on: a kernel starts while the one before ends.

The earlier kernel says when the next one may start, the later one waits before it reads what the earlier one wrote.
Both do nothing where a kernel is not launched so. In kernels PDL is the constant that says whether it is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start as soon as every program of this one has come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are visible; nothing it writes may be read before."""
    if PDL:
        gdc_wait()
