import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from morphoquant_vllm.cpu.build import Kernels
from tests.checkpoints import write_random_checkpoint
from tests.morphoquant_vllm.cpu import libraries as cpu_libraries


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(directory)
    return directory


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture(scope="module")
def engine_context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment of vLLM's layers: a configuration, and a process group of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    file = tmp_path_factory.mktemp("group") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=["avx2", "avx_vnni", "avx512_vnni", "avx512_vnni emulated"])
def library(request) -> Kernels:
    """The CPU kernels of each instruction set, on the processor or emulated; skips if neither is possible."""
    if request.param.endswith("emulated"):
        return cpu_libraries.emulated()
    return cpu_libraries.native(request.param)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """Run the test on one and on two of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
