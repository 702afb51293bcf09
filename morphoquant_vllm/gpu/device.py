"""The GPU at hand: its architecture in the tile table and its number of multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu.tiles import Architecture, architecture_of, architectures

# Lowest compute capability with programmatic dependent launch.
OLDEST_PDL = 9.0


@dataclass(frozen=True)
class Profile:
    """The properties of a device that a launch depends on."""

    architecture: Architecture
    units: int  # multiprocessors
    # Whether unpacking may use NVIDIA instructions; the interpreter and AMD use the plain Triton twin.
    inline_assembly: bool
    # Whether kernels may start while the one before ends; see kernels/pdl.py.
    pdl: bool


def device_name(device: torch.device) -> str:
    """Compute capability ("8.9"), or the name of AMD's target ("gfx942")."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@cache
def profile_of(device: torch.device) -> Profile:
    """The profile of a GPU, cached; raises MorphoQuantError if the tile table has no tiles for it."""
    name = device_name(device)
    architecture = architecture_of(name)
    if architecture is None:
        raise MorphoQuantError(f"GPU {name} is not served; {supported()}")
    units = torch.cuda.get_device_properties(device).multi_processor_count
    nvidia = architecture.vendor == "nvidia"
    return Profile(architecture, units, nvidia, pdl=nvidia and float(name) >= OLDEST_PDL)


def supported() -> str:
    """The remedy of error messages: the GPUs that are served, or a CPU."""
    names = sorted(name for architecture in architectures().values() for name in architecture.devices)
    return f"serve on a GPU of compute capability or target {', '.join(names)}, or on a CPU"
