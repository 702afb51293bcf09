"""Registration: in every process, twice, without kernels or model code, and harmless to other methods."""

import importlib.metadata
import multiprocessing
import subprocess
import sys

import pytest

from tests.engine.conftest import REPOSITORY

# vLLM's own import takes most of a test's time here.
IMPORTS = """
import sys
import morphoquant_vllm.plugin
assert not [m for m in sys.modules if m.split(".")[0] in ("vllm", "torch")], "importing the package imports nothing"
import vllm.model_executor.layers.quantization as quantization
before = list(quantization.QUANTIZATION_METHODS)
loaded = set(sys.modules)
morphoquant_vllm.plugin.register()
morphoquant_vllm.plugin.register()
new = set(sys.modules) - loaded
assert quantization.QUANTIZATION_METHODS == [*before, "morphoquant"], "registered once, nothing else touched"
models = [m for m in sys.modules if m.startswith("vllm.model_executor.models")]
assert not models, models
kernels = [m for m in new if m.split(".")[0] == "triton" or m.endswith(("._C", ".ops", ".linear_method"))]
assert not kernels, kernels
from morphoquant_vllm.plugin.config import MorphoQuantConfig
assert quantization.get_quantization_config("morphoquant") is MorphoQuantConfig
assert quantization.get_quantization_config("fp8").__module__.startswith("vllm.")
"""


def test_register_imports_no_kernel_and_no_model_code() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_is_installed() -> None:
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "morphoquant"]
    assert entry.value == "morphoquant_vllm.plugin:register"


def _known_after_loading_plugins(_: int) -> bool:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return "morphoquant" in QUANTIZATION_METHODS


@pytest.mark.slow
def test_a_spawned_process_knows_the_method() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_known_after_loading_plugins, [0]) == [True]
