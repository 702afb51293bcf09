"""A run's fingerprint names the kernels that compute its products."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration.model.source import Source
from calibration.settings.recipe import Recipe
from calibration.work.fingerprint import differences, fingerprint
from morphoquant_vllm import backends
from morphoquant_vllm.cpu import backend as cpu


@pytest.mark.parametrize("run_here", [True, False])
def test_the_instruction_set_of_the_cpu_s_kernels_is_part_of_it(
    run_here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(cpu, "available", lambda: run_here)
    monkeypatch.setitem(backends.BACKENDS, "cpu", replace(backends.BACKENDS["cpu"], instructions=lambda: "avx1024"))
    begun = fingerprint(Recipe(), torch.device("cpu"), Source(tmp_path, {}, {}), [])
    assert begun["versions"]["cpu"].endswith(" avx1024 kernels") == run_here


def test_another_gpu_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    source, found = Source(tmp_path, {}, {}), []
    for name in ("A100", "H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found.append(fingerprint(Recipe(), torch.device("cuda", 0), source, []))
    assert differences(*found) == ['gpu was "A100", now "H100"']
