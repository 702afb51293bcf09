"""The script for GPTQModel, without that package: the weights it writes, and the refusal of another release."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.peers import with_gptqmodel


class Packed(nn.Module):
    """A layer as GPTQModel packs it: codes, a scale in float16 of each group of inputs, and the group of each input."""

    def __init__(self, codes: Tensor, scales: Tensor, groups: Tensor) -> None:
        super().__init__()
        self.codes, self.groups = codes, groups
        self.register_buffer("scales", scales.half())

    def dequantize_weight(self) -> Tensor:
        return self.scales[self.groups] * (self.codes - 8)


def test_packed_layers_alone_are_written_as_their_linears_weights_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 3), generator=generator)
    scales, groups = torch.rand(2, 3, generator=generator), torch.arange(8) // 4
    model = nn.ModuleDict(
        {"layer": nn.ModuleDict({"up_proj": Packed(codes, scales, groups)}), "lm_head": nn.Linear(3, 5)}
    )
    found = with_gptqmodel.dequantized(model)
    # A product in float16 would be off by up to 2^-11 of itself.
    exact = (scales.half().float().repeat_interleave(4, dim=0) * (codes - 8)).t()
    assert set(found) == {"layer.up_proj"}
    assert found["layer.up_proj"].dtype is torch.float32 and torch.equal(found["layer.up_proj"], exact)
    assert found["layer.up_proj"].is_contiguous()


def test_another_release_is_refused_by_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"version": "7.7.0"}))
    monkeypatch.setattr(with_gptqmodel.sys, "argv", ["with_gptqmodel.py", str(job)])
    monkeypatch.setattr(with_gptqmodel, "version", lambda package: "7.6.0")
    with pytest.raises(SystemExit, match=r"gptqmodel 7\.7\.0 is wanted; 7\.6\.0 is installed"):
        with_gptqmodel.main()
