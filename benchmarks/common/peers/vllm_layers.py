"""What vLLM's kernels need to run beside ours without an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager


def why_no_vllm() -> str:
    """Why vLLM's kernels cannot run here; empty if they can."""
    try:
        import vllm.config  # noqa: F401 - the import is the test
    except ImportError as problem:
        return f"vLLM does not load: {problem}"
    return ""


@contextmanager
def vllm_context() -> Iterator[None]:
    """The context that vLLM's kernels need: a configuration, and parallel groups of this one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        # gloo needs no GPU, and a single process exchanges nothing.
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def unless_refused(name: str, peers: Collection[str], reasons: dict[str, str]) -> Iterator[None]:
    """Keep the error of one of `peers` as the reason why it has no time, in its own words; other errors are raised."""
    try:
        yield
    except Exception as problem:
        if name not in peers:
            raise
        reasons[name] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
