"""A driver for Triton that launches nothing: what a call costs the host is measured, and checked, without a GPU.

Kernels are compiled for a real architecture, and Triton does all its work at a launch but the last step: its launcher
is given grid, stream and arguments, and `Launcher` stands in for that, with the same parameters. Tensors lie in host
memory. So neither the driver's own time counts nor that of Triton's launcher in C, which converts the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

# No device has this index: kernels that are compiled for a real one stay apart.
DEVICE = 1 << 20


@dataclass(frozen=True)
class Launched:
    """What a launcher was given."""

    source: Any  # of the compiled kernel: its signature, and what it takes its arguments for
    grid: tuple[int, int, int]
    options: Any  # of the compiled kernel
    arguments: tuple[Any, ...]


class Launcher:
    """In the place of Triton's launcher of a compiled kernel."""

    # Where launches are noted; None while time is measured.
    log: list[Launched] | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(
        self,
        gridX: int,
        gridY: int,
        gridZ: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        launch_enter_hook: Any,
        launch_exit_hook: Any,
        *args: Any,
    ) -> None:
        if Launcher.log is not None:
            Launcher.log.append(Launched(self.source, (gridX, gridY, gridZ), self.metadata, args))


class _Utilities:
    """What Triton asks of a driver while it loads a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the most threads of a program."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class NoDevice:
    """A driver of no device, of a compute capability as "90"."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.launcher_cls = Launcher
        self.utils = _Utilities()

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def no_device(capability: int) -> Iterator[None]:
    """Let Triton launch on no device."""
    config = triton.runtime.driver
    before, config._active = config._active, NoDevice(capability)
    try:
        yield
    finally:
        config._active = before


@contextmanager
def noted() -> Iterator[list[Launched]]:
    """The launches from now on."""
    found: list[Launched] = []
    Launcher.log = found
    try:
        yield found
    finally:
        Launcher.log = None
