"""What every test gets."""

import os

# Before transformers is imported anywhere: no test may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Small operations are faster on one thread, above all beside an engine that uses the cores.
torch.set_num_threads(1)
