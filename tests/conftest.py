"""Fixtures of every test."""

import os

# Before transformers is imported anywhere: no test may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait are slow on a machine with as many busy processes as cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Any

import pytest
import torch

# Small operations are faster on one thread, above all beside an engine that uses the cores.
torch.set_num_threads(1)


# Engine tests share engines, and take longest.
ENGINES = "tests/engine/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests come first, so that the rest fills the other process."""
    items.sort(key=lambda item: not item.nodeid.startswith(ENGINES))


# Optional: without pytest-xdist there is no such hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes share the tests by file, since most fixtures are made once a file; engine tests stay together.

    xdist's own groups (`loadgroup`) do nothing under pytest 9.2, whose tests' names xdist 3.8 cannot change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return ENGINES if file.startswith(ENGINES) else file

    return ByFile(config, log)
