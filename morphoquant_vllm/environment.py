"""The environment variables that this project reads: names, defaults, meaning. Standard library only.

Each is read when it is asked for, never at import. `python -m morphoquant_vllm.environment` prints the table that
docs/reference/environment.md holds.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """A variable that a user may set; `default` holds if it is unset or, but for PLUGINS, empty."""

    name: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return self.name

    def text(self) -> str:
        """Its value now; empty if it is not set."""
        return os.environ.get(self.name, "")


CPU = Variable(
    "MORPHOQUANT_CPU",
    "the best of the processor",
    "Instruction set of the CPU kernels: `avx512_vnni`, `avx_vnni` or `avx2`.",
)
CACHE = Variable("MORPHOQUANT_CACHE", "`morphoquant` in `XDG_CACHE_HOME`", "Directory of the built CPU kernels.")
CACHE_HOME = Variable("XDG_CACHE_HOME", "`~/.cache`", "Directory of all caches of a user.")
CXX = Variable("CXX", "`g++`, else `c++`", "The C++ compiler of the CPU kernels, with its flags.")
TILES = Variable(
    "MORPHOQUANT_TILES",
    "`tiles.json` of the package",
    "File of the tile sizes of the GPU kernels, as `python -m morphoquant_vllm.gpu.tools.autotune` writes it.",
)
FUSION = Variable(
    "MORPHOQUANT_FUSION",
    "`0`",
    "`1`: in compiled models on a GPU, quantizers compute the RMSNorm or the silu(gate) * up before them, too.",
)
WORKSPACE = Variable(
    "MORPHOQUANT_WORKSPACE",
    "`1`",
    "`0`: on a GPU, no int8 memory is held, into which layers with two-level scales are unpacked for long prompts.",
)
CHECKSUMS = Variable(
    "MORPHOQUANT_CHECKSUMS",
    "`1`",
    "`0`: a checkpoint is loaded without reading every file first for its SHA-256, and for NaN and infinity.",
)
WAIT_POLICY = Variable(
    "OMP_WAIT_POLICY",
    "`PASSIVE` in the command `morphoquant`",
    "Whether OpenMP's threads sleep or spin (`ACTIVE`) while they wait; it matters if cores are shared.",
)
PLUGINS = Variable(
    "VLLM_PLUGINS",
    "all",
    "Names of the plugins that vLLM loads, separated by commas; `morphoquant doctor` notices if this one is left out.",
)
KV_CACHE = Variable(
    "VLLM_CPU_KVCACHE_SPACE",
    "none: vLLM takes 92 % of the memory",
    "GiB of the cache of keys and values on a CPU. vLLM reads it; `morphoquant doctor` looks whether it is needed.",
)
VARIABLES = (CPU, CACHE, CACHE_HOME, CXX, TILES, FUSION, WORKSPACE, CHECKSUMS, WAIT_POLICY, PLUGINS, KV_CACHE)


def cpu_instructions() -> str:
    """The instruction set that the user chose for the CPU kernels, or empty."""
    return CPU.text()


def cache_directory() -> Path | None:
    """The absolute directory of built CPU kernels; None if the user has no home directory and names no other."""
    try:
        if chosen := CACHE.text():
            return Path(chosen).absolute()
        return Path(CACHE_HOME.text() or Path.home() / ".cache").absolute() / "morphoquant"
    # RuntimeError: no HOME and no entry in the system's list of users. OSError: the current directory is gone.
    except (RuntimeError, OSError):
        return None


def compiler() -> list[str]:
    """The command of the user's C++ compiler, empty if none is set. Raises ValueError if a quote is left open.

    The path of an existing file is taken as it stands: it may hold spaces and quotes.
    """
    text = CXX.text()
    # Not Path.is_file, which raises for a name that is too long.
    return [text] if os.path.isfile(text) else shlex.split(text)


def tile_table() -> Path | None:
    """The user's tile table of the GPU kernels."""
    return Path(TILES.text()) if TILES.text() else None


def fusion() -> bool:
    """Whether the user wants the graph passes that fuse quantizers with the operations before them."""
    return FUSION.text() == "1"


def workspace_wanted() -> bool:
    """Whether the GPU backend may hold an int8 workspace."""
    return WORKSPACE.text() != "0"


def checksums_wanted() -> bool:
    """Whether the content of a checkpoint's files is checked before it is loaded."""
    return CHECKSUMS.text() != "0"


def plugins() -> list[str] | None:
    """Names of the plugins that vLLM loads; None if it loads all."""
    # An empty value is a choice of none for vLLM.
    chosen = os.environ.get(PLUGINS.name)
    return None if chosen is None else chosen.split(",")


def without_plugins() -> dict[str, str]:
    """The variables of this process, for a child in which vLLM loads no plugin."""
    return {**os.environ, PLUGINS.name: ""}


def kv_cache_space() -> str:
    """GiB of vLLM's cache of keys and values on a CPU; empty if vLLM chooses."""
    return "" if KV_CACHE.text() == "0" else KV_CACHE.text()


def kv_cache_space_is_legal() -> bool:
    """Whether vLLM, which reads a whole number, starts with its variable; it does not if this one is empty."""
    given = os.environ.get(KV_CACHE.name)
    try:
        return given is None or int(given) >= 0
    except ValueError:
        return False


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user says otherwise. Works before torch is imported."""
    os.environ[WAIT_POLICY.name] = WAIT_POLICY.text() or "PASSIVE"


def table() -> str:
    """A row of Markdown for every variable."""
    rows = [f"| `{item.name}` | {item.default} | {item.meaning} |" for item in VARIABLES]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
