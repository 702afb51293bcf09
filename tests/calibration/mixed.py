"""A calibration whose inputs have forms that the caller chooses: 8-bit weights, 16 bit, or the usual 4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from calibration import precision
from calibration.calibrate import calibrate
from calibration.settings.recipe import Recipe
from calibration.work.budgets import Choice

# Every form, in column-parallel and row-parallel linears; 8-bit weights in fused ones, and in both kinds.
FORMS = {"0.self_attn.qkv_proj": 8, "0.mlp.down_proj": 8, "1.self_attn.o_proj": 16, "1.mlp.gate_up_proj": 8}


def calibrate_mixed(
    model: Path, data: Path, output: Path, patch: pytest.MonkeyPatch, prefix: str, forms: Mapping[str, int] = FORMS
) -> dict[str, Any]:
    """The report of a checkpoint with `forms`, which are below `prefix`."""
    chosen = {f"{prefix}.{name}": form for name, form in forms.items()}
    patch.setattr(precision, "choose", lambda job, measured: Choice(chosen, 6.0, dict.fromkeys(measured.losses, 0.1)))
    return calibrate(model, data, output, recipe=Recipe(device="cpu", sample_tokens=64, bits_budget=6.0))
