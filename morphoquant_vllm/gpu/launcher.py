"""One launch of a kernel: described, run by Triton, or bound to a layer so that a call costs the host little.

`Launch.run` goes through Triton's JIT: it binds some thirty arguments by name, asks each for its type and alignment and
hashes the answers, at every call. `bind` does that once, while a layer is loaded, and keeps the compiled kernel with
the arguments that stay the same. A call fills in the others and gives all to Triton's launcher for that kernel.

    Launch(int4_gemm, grid, {"codes_ptr": codes, ..., "M": 1, ..., "BLOCK_N": 64}, {"num_warps": 4})
        run()  -> by Triton
        bind(launch, ("codes_ptr", "M"))  -> call(grid, stream, (codes, 1)): the same kernel, the same arguments

A compiled kernel relies on what the arguments were when it was bound: which pointers and sizes are multiples of 16. So
whoever varies an argument promises that it is one again; tests/morphoquant_vllm/gpu/test_bound.py holds them to it.

The launcher's form is private to Triton (compat.TRITON_PARTS): the same in 3.6 to 3.9. Under another, and in Triton's
interpreter, the JIT serves.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from triton import knobs

logger = logging.getLogger("vllm.morphoquant_vllm.gpu.launcher")

# What a launcher is given before the kernel's arguments. It may take those from the sixth on with the arguments.
LEADING = (
    *("gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
)
NEEDED_BY_NAME = 5

# grid of two sizes, stream, and the arguments that vary.
Call = Callable[[tuple[int, int], int, Sequence[Any]], None]


@dataclass(frozen=True)
class Launch:
    """A launch, described."""

    kernel: Any
    grid: tuple[int, int]
    # All of the kernel's, constants included, by name.
    arguments: dict[str, Any]
    # What is Triton's own: num_warps, launch_pdl and so on.
    options: dict[str, Any]

    def run(self) -> Any:
        """Launch through Triton's JIT. Returns the compiled kernel; in the interpreter None."""
        return self.kernel[self.grid](**self.arguments, **self.options)


class JitCall:
    """The launch through Triton's JIT, with other values for some arguments."""

    def __init__(self, launch: Launch, varying: Sequence[str]) -> None:
        self.kernel, self.options = launch.kernel, launch.options
        # Nothing that varies is kept alive.
        self.constant = {name: value for name, value in launch.arguments.items() if name not in varying}
        self.varying = tuple(varying)

    def __call__(self, grid: tuple[int, int], stream: int, values: Sequence[Any]) -> None:
        """`stream` must be the current one: Triton asks for it."""
        arguments = self.constant | dict(zip(self.varying, values, strict=True))
        Launch(self.kernel, grid, arguments, self.options).run()


class CompiledCall:
    """The launch of a compiled kernel, without Triton's JIT. Constant tensors must outlive it at their addresses."""

    __slots__ = ("arguments", "function", "kernel", "metadata", "places", "start")

    def __init__(self, kernel: Any, launch: Launch, varying: Sequence[str]) -> None:
        names = launch.kernel.arg_names
        self.kernel = kernel
        self.start = kernel.run
        self.function, self.metadata = kernel.function, kernel.packed_metadata
        # Addresses instead of tensors: Triton's launcher would ask the driver about each tensor.
        self.arguments = [_address(launch.arguments[name]) for name in names]
        self.places = tuple(names.index(name) for name in varying)

    def __call__(self, grid: tuple[int, int], stream: int, values: Sequence[Any]) -> None:
        arguments = self.arguments.copy()
        for place, value in zip(self.places, values):  # noqa: B905 - this line runs for every launch
            arguments[place] = value if type(value) is int else _address(value)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        described = None
        if _is_empty(enter) and _is_empty(leave):
            enter = leave = None
        else:
            described = self.kernel.launch_metadata((*grid, 1), stream, *arguments)
        self.start(*grid, 1, stream, self.function, self.metadata, described, enter, leave, *arguments)


def bind(launch: Launch, varying: Sequence[str]) -> Call:
    """Run a launch once, and return a call of it that takes the `varying` arguments by position.

    A varying pointer must stay a multiple of 16 bytes, and a size a multiple of 16, if it is one now: unless the kernel
    says that it is not specialised on it.
    """
    kernel = launch.run()
    if kernel is None:
        return JitCall(launch, varying)
    if not has_known_form(kernel):
        _say_that_the_jit_serves()
        return JitCall(launch, varying)
    return CompiledCall(kernel, launch, varying)


def has_known_form(kernel: Any) -> bool:
    """Whether a compiled kernel can be launched as `CompiledCall` does."""
    if not all(hasattr(kernel, name) for name in ("run", "function", "packed_metadata", "launch_metadata")):
        return False
    try:
        parameters = list(inspect.signature(kernel.run).parameters.values())
    except (TypeError, ValueError):
        return False
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return False
    names = tuple(parameter.name for parameter in parameters[:-1])
    return len(names) >= NEEDED_BY_NAME and names == LEADING[: len(names)]


@cache
def _say_that_the_jit_serves() -> None:
    import triton

    logger.warning(
        "Triton %s launches compiled kernels in a way that this release does not know: its slower launch serves. "
        "Outside CUDA graphs prompts then wait for the CPU.",
        triton.__version__,
    )


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _is_empty(hook: Any) -> bool:
    """Whether a hook of Triton, None or a chain of functions, does nothing."""
    return hook is None or getattr(hook, "calls", None) == []
