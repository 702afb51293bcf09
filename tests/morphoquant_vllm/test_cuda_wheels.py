"""The CUDA builds of vLLM have the interfaces that the plugin uses: as far as their Python code goes, without CUDA.

Each build is installed without its dependencies into a folder of its own, which stands before this environment's
vLLM on Python's path; everything else comes from the environment. Its compiled libraries need CUDA and are left out.
VLLM_TARGET_DEVICE=cpu makes a CUDA build take vLLM's CPU platform.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "cuda-wheels"
_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__"
_LOADING = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.track_weights_loading"
_OLDER = [_LOADING, _EMBEDDING]
# The releases that pyproject.toml admits, and the interfaces in which each differs.
RELEASES: dict[str, list[str]] = {"0.30.0": _OLDER, "0.31.0": _OLDER, "0.32.0": [], "0.33.0": []}
_TESTS = "tests/morphoquant_vllm/plugin"
# vLLM 0.30's activation calls a compiled operator, which a later one does without. Its router takes no quantization
# config, so there is nothing to refuse.
OTHERWISE = {
    "0.30.0": [
        f"--deselect={_TESTS}/test_silu_mul_pass.py::test_vllm_s_own_mlp_is_fused",
        f"--deselect={_TESTS}/test_experts_method.py::TestRefusals::test_a_router_is_not_quantized",
    ]
}
# Tests of the plugin that need vLLM's Python code alone.
PLUGIN_TESTS = (
    "test_config.py",
    "test_experts_method.py",
    "test_fusion.py",
    "test_linear_method.py",
    "test_linear_method_ranks.py",
    "test_modality_bus.py",
    "test_norm_quant_pass.py",
    "test_registration.py",
    "test_silu_mul_pass.py",
)
# Interfaces of vLLM that benchmarks.gpu_linear uses.
BENCHMARK = (
    "vllm.config:set_current_vllm_config",
    "vllm.scalar_type:scalar_types",
    "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel:MPLinearLayerConfig",
    *(
        f"vllm.model_executor.kernels.linear.mixed_precision.{kernel}.{method}"
        for kernel in ("marlin:MarlinLinearKernel", "humming:HummingLinearKernel")
        for method in ("can_implement", "process_weights_after_loading", "apply_weights")
    ),
)

pytestmark = pytest.mark.full


def install(version: str) -> Path:
    """The build's Python code; skips if the package index does not provide it."""
    target = CACHE / f"vllm-{version}"
    if target.is_dir():
        return target
    staged = target.with_name(target.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--target", str(staged), f"vllm=={version}"], capture_output=True, text=True
    )
    if done.returncode:
        shutil.rmtree(staged, ignore_errors=True)
        pytest.skip(f"vllm {version} cannot be installed: {' '.join(done.stderr.split())[-200:]}")
    for library in staged.rglob("*.so*"):
        library.unlink()
    staged.rename(target)
    return target


def run(build: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the build's vLLM."""
    environment = {**os.environ, "PYTHONPATH": f"{build}:{REPOSITORY}", "VLLM_TARGET_DEVICE": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)


def differences(build: Path) -> list[str]:
    """The interfaces of the build that differ from compat.INTERFACES."""
    done = run(build, "-m", "morphoquant_vllm.compat")
    *lines, summary = done.stdout.strip().splitlines() or [done.stderr[-2000:]]
    version = build.name.removeprefix("vllm-")
    assert summary.startswith(f"vLLM {version}: "), "another vLLM came first: " + summary
    return [line.partition(" is ")[0] for line in lines if line.startswith("vllm.")]


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_differs_as_it_is_known_to(version: str) -> None:
    assert differences(install(version)) == RELEASES[version]


@pytest.mark.parametrize("version", RELEASES)
def test_the_plugin_s_tests_pass_on_its_python_code(version: str) -> None:
    build = install(version)
    tests = [str(Path(__file__).parent / "plugin" / name) for name in PLUGIN_TESTS]
    done = run(
        build, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", *OTHERWISE.get(version, []), *tests
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("version", RELEASES)
def test_what_the_gpu_benchmark_uses_is_there(version: str) -> None:
    code = f"from morphoquant_vllm.compat import describe\nfor path in {BENCHMARK}: print(path, describe(path))"
    done = run(install(version), "-c", code)
    found = [line for line in done.stdout.splitlines() if line.startswith("vllm.")]
    assert len(found) == len(BENCHMARK), done.stderr[-2000:]
    assert [line for line in found if "missing" in line] == []
