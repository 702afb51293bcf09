"""The wheel in a fresh environment without a compiler: its kernels load, the doctor knows them, and vLLM answers."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from openai import OpenAI

from benchmarks.common.server import serve
from tests.calibration.built_models import TinyModels
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
# Names of compilers, with their targets and versions.
COMPILER = re.compile(r"(^|-)(cc|c\+\+|gcc|g\+\+|cpp|clang.*)(-[\d.]+)?$")
PREBUILT = "morphoquant_vllm/cpu/prebuilt/"
COMPUTE = """
import json, shutil
import morphoquant_vllm
from morphoquant_vllm.cpu import build, shipped
from tests.morphoquant_vllm.cpu.cases import case, compare_shape
kernels = build.kernels()
compare_shape(70, 640, 64, kernels)
print(json.dumps([morphoquant_vllm.__file__, shutil.which("g++"), str(shipped.find(kernels.instructions))]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy of the files that git would package."""
    cpu_libraries.native("avx2")  # skips without a compiler or AVX2
    folder, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("copy")
    files = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in map(os.fsdecode, filter(None, files.split(b"\0"))):
        if name.startswith(("morphoquant_vllm/", "calibration/")) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    subprocess.run(command, cwd=copy, check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Python of a fresh environment with the wheel, and variables without a compiler and with an empty cache.

    torch and vLLM come from the environment of the tests, which would take minutes to install again.
    """
    place = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (folder,) = place.glob("lib/python*/site-packages")
    (folder / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    tools = place / "tools"
    tools.mkdir()
    for tool in (tool for folder in ("/usr/bin", "/bin") for tool in Path(folder).iterdir()):
        if not COMPILER.search(tool.name) and not (tools / tool.name).exists():
            (tools / tool.name).symlink_to(tool)
    # The empty value of CXX is like none.
    variables = {
        "PATH": f"{place}/bin:{tools}",
        "MORPHOQUANT_CACHE": str(place / "cache"),
        "CXX": "",
        "HF_HUB_OFFLINE": "1",
    }
    return python, {"HOME": str(place), "PYTHONPATH": "", "LANG": "C.UTF-8", **variables}


def test_a_wheel_has_kernels_and_no_tests(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        f"{PREBUILT}{name}" for name in ("cpu-avx2.so", "cpu-avx_vnni.so", "cpu-avx512_vnni.so", "manifest.json")
    } <= names
    assert {"morphoquant_vllm/gpu/tiles.json", "calibration/output/page/page.html.j2"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "setup"))]


def test_its_kernels_compute_as_the_reference_without_a_compiler(bare: tuple[Path, dict[str, str]]) -> None:
    python, variables = bare
    # The tests' cases come from this tree, the package from the wheel, which stands before it.
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{COMPUTE}"
    done = subprocess.run([str(python), "-c", code], env=variables, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, compiler, library = json.loads(done.stdout.splitlines()[-1])
    assert package.startswith(variables["HOME"]) and library.startswith(variables["HOME"]) and compiler is None
    assert not Path(variables["MORPHOQUANT_CACHE"]).exists()


def test_the_doctor_says_what_is_missing(bare: tuple[Path, dict[str, str]]) -> None:
    python, variables = bare
    command = [str(python.parent / "morphoquant"), "doctor", "--json"]
    done = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["compiler"]["state"] == "note" and "--enforce-eager" in findings["compiler"]["text"]
    assert "kernels of the wheel" in findings["processor"]["text"]
    assert findings["plugin"]["state"] == findings["interfaces"]["state"] == "ok"


def test_vllm_serves_a_checkpoint_without_a_compiler(
    bare: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.calibrate import calibrate
    from calibration.settings.recipe import Recipe

    python, variables = bare
    (tmp_path / "tiny").mkdir()
    tiny, output = TinyModels(tmp_path / "tiny"), tmp_path / "out"
    calibrate(tiny.model("llama"), tiny.data("llama"), output, recipe=Recipe(device="cpu", sample_tokens=64))
    entry = python.parent / "vllm"
    entry.write_text(
        f"#!{python}\nfrom vllm.entrypoints.cli.main import main\nif __name__ == '__main__':\n    main()\n"
    )
    entry.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    arguments = ["--enforce-eager", "--max-model-len", "64", "--dtype", "float32"]
    with serve(output, tmp_path / "log", arguments, environment=variables) as server:
        client = OpenAI(base_url=server.openai_url, api_key="none")
        answer = client.completions.create(model=str(output), prompt=[1, 2, 3], max_tokens=4, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    log = (tmp_path / "log").read_text()
    assert "slow torch reference" not in log
    assert not Path(variables["MORPHOQUANT_CACHE"]).exists()
