"""One launch of a kernel: described and run by Triton's JIT, or compiled, which costs the host little.

`Launch.run` goes through Triton's JIT. At every call the JIT binds some thirty arguments by name, reads type and
alignment of each, and hashes them. `must_be_compiled` does that once, while a layer is loaded. It keeps the kernel with
the arguments that stay the same. Those that vary are the first ones of each kernel:

    int4_gemm   codes_ptr, rows_ptr, out_ptr, M, splits | weight_ptr, scale_ptr, ..., N, K, G, P, ..., PDL
                passed at each call                     | kept, tensors as addresses

A compiled kernel assumes that the pointers and sizes that were multiples of 16 still are. A caller that varies one
keeps it a multiple of 16, unless the kernel is declared not to be specialised on it.
tests/morphoquant_vllm/gpu/test_bound.py tests bound.py for that.

The form of Triton's launcher is private (private_parts.PRIVATE_PARTS), and the same in 3.6, 3.7 and 3.9. If the form is
another, as in Triton's interpreter, there is no compiled launch, and `Launch.run` serves.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton import knobs

# Parameters of a launcher before the kernel's arguments. It may take those from the sixth on with the arguments.
LEADING = (
    *("gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
)
NEEDED_BY_NAME = 5


@dataclass(frozen=True)
class Launch:
    """A launch, described."""

    kernel: Any
    grid: tuple[int, int]
    # All arguments of the kernel by name, constants included.
    arguments: dict[str, Any]
    # Options of Triton: num_warps, launch_pdl and so on.
    options: dict[str, Any]

    def run(self) -> Any:
        """Launch through Triton's JIT. Returns the compiled kernel, or None in the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)


class UnknownFormError(Exception):
    """Raised if Triton launches compiled kernels in another way, or interprets them: nothing can be kept."""


class CompiledLaunch:
    """The launch of a compiled kernel. Tensors among the kept arguments must outlive it at their addresses."""

    __slots__ = ("function", "kept", "kernel", "metadata", "names", "start")

    def __init__(self, kernel: Any, launch: Launch, varying: int) -> None:
        """Keep all arguments but the first `varying` ones, which each call passes."""
        self.kernel, self.start = kernel, kernel.run
        self.function, self.metadata = kernel.function, kernel.packed_metadata
        self.names = launch.kernel.arg_names[varying:]
        # Addresses instead of tensors: Triton's launcher would ask the driver about each tensor.
        self.kept = tuple(_address(launch.arguments[name]) for name in self.names)

    def keep(self, name: str, value: Any) -> None:
        """Replace the kept value of the argument `name`. The new value must have the alignment of the old one."""
        place = self.names.index(name)
        self.kept = (*self.kept[:place], _address(value), *self.kept[place + 1 :])

    def __call__(self, first: int, second: int, stream: int, *values: Any) -> None:
        """Launch on a grid [first, second], with addresses and sizes as the kernel's first arguments."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        described = None
        if _is_empty(enter) and _is_empty(leave):
            enter = leave = None
        else:
            described = self.kernel.launch_metadata((first, second, 1), stream, *values, *self.kept)
        self.start(
            *(first, second, 1, stream, self.function, self.metadata, described, enter, leave), *values, *self.kept
        )


def must_be_compiled(launch: Launch, last_varying: str | None) -> CompiledLaunch:
    """Run a launch once, and return it compiled. Each call passes the arguments up to `last_varying`; None: none.

    Raises UnknownFormError.
    """
    kernel = launch.run()
    if not has_known_form(kernel):
        raise UnknownFormError
    varying = 0 if last_varying is None else launch.kernel.arg_names.index(last_varying) + 1
    return CompiledLaunch(kernel, launch, varying)


def has_known_form(kernel: Any) -> bool:
    """Whether a compiled kernel can be launched as `CompiledLaunch` does."""
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


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _is_empty(hook: Any) -> bool:
    """Whether a hook of Triton does nothing: it is None or an empty chain of functions."""
    return hook is None or getattr(hook, "calls", None) == []
