"""Records that take the place of served ones, and the two layers of an MLP that wait for each other."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.plugin import reload
from morphoquant_vllm.plugin.reload import ReloadedPair, replace_records
from tests.checkpoints import file_of, flip_bit, seal_again, write_random_checkpoint


def test_new_records_take_the_place_of_the_served_ones() -> None:
    served = ([torch.zeros(3), torch.zeros(2)], [torch.zeros(4)])
    places = [tensor.data_ptr() for kind in served for tensor in kind]
    replace_records("mlp.up_proj", served, ([torch.ones(3), torch.ones(2)], [torch.ones(4)]))
    assert all(bool((tensor == 1).all()) for kind in served for tensor in kind)
    assert places == [tensor.data_ptr() for kind in served for tensor in kind]


def test_records_of_another_shape_are_refused_before_any_is_replaced() -> None:
    served = ([torch.zeros(3)], [torch.zeros(4)])
    with pytest.raises(MorphoQuantError, match=r"mlp.up_proj: the new weights need other memory .*start a new server"):
        replace_records("mlp.up_proj", served, ([torch.ones(3)], [torch.ones(5)]))
    assert not served[0][0].any()


def test_any_file_that_is_written_anew_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer may write the weights alone."""
    write_random_checkpoint(tmp_path)
    checked: list[Path] = []
    monkeypatch.setattr(reload, "check_directory", lambda directory, complete: checked.append(directory))
    config = cast(VllmConfig, SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path))))
    spec, check = read_spec(tmp_path), reload.ReloadCheck()
    for _ in range(3):
        check.check(config, spec)
    assert len(checked) == 1
    for count, path in enumerate(sorted(tmp_path.iterdir()), start=2):
        os.utime(path, ns=(0, count))
        check.check(config, spec)
        check.check(config, spec)
        assert len(checked) == count, path


def test_a_file_that_kept_its_time_and_size_is_checked_again(tmp_path: Path) -> None:
    """As rsync writes it, or a program that sets the time back."""
    write_random_checkpoint(tmp_path)
    config = cast(VllmConfig, SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path))))
    spec, check = read_spec(tmp_path), reload.ReloadCheck()
    check.check(config, spec)
    path = file_of(tmp_path, "model.norm.weight")
    status = path.stat()
    flip_bit(tmp_path, "model.norm.weight")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(MorphoQuantError, match="its SHA-256 is not the recorded one"):
        check.check(config, spec)


def test_another_config_json_is_refused_by_its_field(tmp_path: Path) -> None:
    """Norms and angles are in no setting of ours."""
    write_random_checkpoint(tmp_path / "served")
    write_random_checkpoint(tmp_path / "new")
    served = read_spec(tmp_path / "served")
    path = tmp_path / "new" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    seal_again(tmp_path / "new")
    config = cast(VllmConfig, SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path / "new"))))
    with pytest.raises(MorphoQuantError, match=r"its settings \(rms_norm_eps\) are not those that are served; start"):
        reload.ReloadCheck().check(config, served)
    same = cast(VllmConfig, SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path / "served"))))
    reload.ReloadCheck().check(same, served)


@pytest.mark.parametrize("down_first", [False, True])
def test_both_layers_of_an_mlp_get_the_new_order_of_down_proj(down_first: bool) -> None:
    pair, given = ReloadedPair(), []
    down = {"channel_order": torch.tensor([2, 0, 1], dtype=torch.int32)}

    def finish(name: str, order: Tensor) -> None:
        given.append((name, order.tolist()))

    steps = [(False, {}, "gate_up"), (True, down, "down")]
    for is_down, tensors, name in steps[:: -1 if down_first else 1]:
        assert not given, "the first waits"
        pair.take(is_down, tensors, lambda order, name=name: finish(name, order))
    assert sorted(given) == [("down", [2, 0, 1]), ("gate_up", [2, 0, 1])]
    given.clear()
    pair.take(True, down, lambda order: finish("down", order))
    assert not given, "a second reload begins anew"
