"""A driver for Triton that launches nothing: measures and checks the host's side of a call without a GPU.

Kernels are compiled for a real architecture. At a launch Triton does everything except its last step, the launcher.
`Launcher` replaces that, with the same parameters: grid, stream and arguments. Tensors lie in host memory. So the time
of the driver is missing, and that of Triton's launcher in C, which converts the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

# No device has this index, which keeps these kernels apart from kernels for a real device.
DEVICE = 1 << 20


@dataclass(frozen=True)
class Launched:
    """The arguments that a launcher received."""

    source: Any  # of the compiled kernel: its signature, and its assumptions about arguments
    grid: tuple[int, int, int]
    options: Any  # of the compiled kernel
    arguments: tuple[Any, ...]


class Launcher:
    """Replacement for Triton's launcher of a compiled kernel."""

    # The list that launches are added to; None while time is measured.
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
    """The functions of a driver that Triton calls while it loads a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the most threads of a program."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class NoDevice:
    """A driver without a device, for a compute capability such as 90."""

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
    """Let Triton launch without a device."""
    config = triton.runtime.driver
    before, config._active = config._active, NoDevice(capability)
    try:
        yield
    finally:
        config._active = before


@contextmanager
def noted() -> Iterator[list[Launched]]:
    """The list of all launches within the context."""
    found: list[Launched] = []
    Launcher.log = found
    try:
        yield found
    finally:
        Launcher.log = None
