"""Fixtures of every test."""

import os

# Before transformers is imported anywhere: no test may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait are slow on a machine with as many busy processes as cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest
import torch

ENGINES = Path(__file__).parent / "engine"

# Small operations are faster on one thread, above all beside an engine that uses the cores.
torch.set_num_threads(1)


# First: xdist reads the marks in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several workers share the tests by file, since fixtures are made once a file.

    Engine tests stay together, since they share engines, and come first: they take longest.
    """
    items.sort(key=lambda item: ENGINES not in item.path.parents)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("engine" if ENGINES in item.path.parents else str(item.path)))
