"""Fixtures of every test."""

import os

# Before transformers is imported anywhere: no test may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait are slow on a machine with as many busy processes as cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Small operations are faster on one thread, above all beside an engine that uses the cores.
torch.set_num_threads(1)
