"""Records of saved states: a directory that is incomplete, damaged or of another origin is refused in one line."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import ShardedStateLoader

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import read_spec
from morphoquant_vllm.format.integrity import digest, file_digest
from morphoquant_vllm.plugin import sharded_state
from morphoquant_vllm.plugin.sharded_state import Place, RankState, SavedState, check_state
from tests.checkpoints import edit, write_random_checkpoint


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """A directory with the states of two ranks, as save_sharded_state leaves it."""
    spec = write_random_checkpoint(tmp_path / "checkpoint", layers=1)
    directory = tmp_path / "states"
    directory.mkdir()
    (directory / "config.json").write_bytes((tmp_path / "checkpoint" / "config.json").read_bytes())
    for rank in range(2):
        file = directory / f"model-rank-{rank}-part-0.safetensors"
        save_file({"norm.weight": torch.full((4,), float(rank))}, file)
        RankState(
            place=Place(rank, 2, 0, 1),
            created_by=sharded_state._VERSION,
            backend="cpu",
            settings=sharded_state.origin(spec),
            renumbered=False,
            files={file.name: file_digest(file)},
            layers={"model.layers.0.mlp.down_proj": ([["uint8", [128]]], [["float32", [2, 3]]])},
        ).write(directory)
    return directory


def manifest(directory: Path, rank: int = 0) -> Path:
    return directory / f"morphoquant-state-{rank}-of-2-stage-0-of-1.json"


def change(directory: Path, **fields: object) -> None:
    replace(RankState.read(manifest(directory)), **fields).write(directory)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def set_rope(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_theta": 5.0}))


def change_shape(directory: Path) -> None:
    manifest(directory).write_text(manifest(directory).read_text().replace("128", "129"))


def add_field(directory: Path) -> None:
    """As a later version may."""
    content = json.loads(manifest(directory).read_text())
    del content["digest"]
    content["heads"] = 8
    manifest(directory).write_text(json.dumps({**content, "digest": digest(content)}))


def test_a_whole_directory_is_taken_and_a_checkpoint_is_left_to_its_own_check(states: Path, tmp_path: Path) -> None:
    saved = SavedState()
    assert not saved.take(tmp_path / "checkpoint") and saved.directory is None
    assert saved.take(states) and saved.directory == states
    assert RankState.read(manifest(states)).layers == {
        "model.layers.0.mlp.down_proj": [[["uint8", [128]]], [["float32", [2, 3]]]]
    }


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: manifest(d, 1).unlink(), "holds 1 of 2 ranks' states"),
        (lambda d: (d / "model-rank-1-part-0.safetensors").unlink(), "model-rank-1-part-0.safetensors: no such file"),
        (lambda d: flip(d / "model-rank-1-part-0.safetensors"), "its SHA-256 is not the recorded one"),
        (lambda d: save_file({"a": torch.ones(1)}, d / "model-rank-0-part-1.safetensors"), "belongs to no saved state"),
        (lambda d: os.mkfifo(d / "chat_template.jinja"), "chat_template.jinja: is not a regular file"),
        (add_field, "is a manifest of another version"),
        (change_shape, "stage-0-of-1.json: is damaged"),
        (set_rope, "changed after the checkpoint was made"),
        (lambda d: change(d, created_by="morphoquant-vllm 9"), "was saved by morphoquant-vllm 9"),
        (lambda d: change(d, settings="0"), "belongs to another checkpoint than the config.json"),
    ],
)
def test_what_is_not_whole_is_refused(states: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(states)
    with pytest.raises(MorphoQuantError, match=line) as refused:
        check_state(states)
    assert "\n" not in str(refused.value)


def test_a_directory_whose_name_vllm_takes_for_a_pattern_is_refused(states: Path) -> None:
    """vLLM's glob would find the states of `states1` for `states[1]`."""
    named = states.rename(states.with_name("states[1]"))
    with pytest.raises(MorphoQuantError, match="for a pattern, and would read other files; rename the folder"):
        SavedState().take(named)
    link = named.with_name("link")
    link.symlink_to(named)
    assert SavedState().take(link)


def test_ranks_of_two_checkpoints_with_equal_settings_are_refused(states: Path, tmp_path: Path) -> None:
    """As a save leaves them that was ended between two ranks, in a directory that held another state."""
    other = tmp_path / "other"
    spec = write_random_checkpoint(other, layers=1)
    edit(other, "model.layers.0.mlp.down_proj.absorbed_bias", lambda bias: bias + 1)
    edited = read_spec(other)
    assert edited.settings_digest() == spec.settings_digest()
    change(states, settings=sharded_state.origin(edited))
    with pytest.raises(MorphoQuantError, match=r"state-0-of-2.*belongs to another checkpoint than the config.json"):
        check_state(states)


def test_buffers_have_the_recorded_shapes_and_are_saved() -> None:
    layer = torch.nn.Module()
    sharded_state.make_tensors(layer, ([["uint8", [128]], ["bfloat16", [2, 3]]], [["int32", [0]]]))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()}
    assert found == {
        "weight_record_0": (torch.uint8, (128,)),
        "weight_record_1": (torch.bfloat16, (2, 3)),
        "activation_record_0": (torch.int32, (0,)),
    }


def test_a_model_whose_16_bit_weights_vllm_packed_away_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].quant_method = UnquantizedLinearMethod()
    sharded_state._refuse_unsaved(model)
    model[0].weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(MorphoQuantError, match="0: vLLM keeps its 16-bit weight in packed form only"):
        sharded_state._refuse_unsaved(model)


def test_another_method_s_model_is_saved_by_vllm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(ShardedStateLoader, "save_model", staticmethod(lambda *arguments: calls.append(arguments)))
    sharded_state.patch_saving()
    model = torch.nn.Linear(2, 2)
    ShardedStateLoader.save_model(model, str(tmp_path))
    assert calls == [(model, str(tmp_path), None, None)] and not list(tmp_path.iterdir())
    observed = ShardedStateLoader.save_model
    sharded_state.patch_saving()
    assert ShardedStateLoader.save_model is observed


def test_a_state_needs_its_load_format(states: Path) -> None:
    saved = SavedState()
    saved.take(states)
    for load_format, directory in (("auto", states), ("sharded_state", None)):
        saved.directory = directory
        model = SimpleNamespace(model="model")
        loading = SimpleNamespace(load_format=load_format)
        config = SimpleNamespace(load_config=loading, lora_config=None, model_config=model)
        with pytest.raises(MorphoQuantError, match="--load-format sharded_state"):
            saved.of_rank(config)
