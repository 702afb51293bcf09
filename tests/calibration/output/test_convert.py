"""`morphoquant convert`: a checkpoint of the newest version, whose tensors are those of the old one."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.output import convert as module
from calibration.output.convert import convert
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import check_headers, load_layer, read_spec
from morphoquant_vllm.format.layers import GROUP_SCHEME, TWO_LEVEL_SCHEME, ExpertsSpec, stored_name
from morphoquant_vllm.format.schema import DEFAULT_ROWS
from morphoquant_vllm.format.verify import verify_checkpoint
from morphoquant_vllm.numerics.linear import linear
from tests.checkpoints import edit, write_random_checkpoint
from tests.records import activation_of, weight_of

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def to_version_2(directory: Path) -> None:
    config = json.loads((directory / CONFIG).read_text())
    del config["quantization_config"]["integrity"]
    config["quantization_config"]["format_version"] = 2
    (directory / CONFIG).write_text(json.dumps(config))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint of version 2 in two files, with files of all kinds beside the weights."""
    directory = tmp_path / "old"
    write_random_checkpoint(directory, two_level=(GATE_UP,))
    to_version_2(directory)
    (directory / "tokenizer.json").write_text('{"b": 1,   "a": 2}')
    (directory / "morphoquant_calibration").mkdir()
    (directory / "morphoquant_calibration" / "distributions.safetensors").write_bytes(b"not read")
    (directory / "spk_dict.pt").write_bytes(bytes(range(256)))
    return directory


def make_exact(directory: Path, layers: Iterable[str]) -> None:
    """Give layers group scales that are whole multiples of one per output."""
    generator = torch.Generator().manual_seed(5)

    def multiples(scale: Tensor) -> Tensor:
        unit = torch.randint(1, 16, (scale.shape[0], 1), generator=generator) / 512
        return (unit * torch.randint(1, 17, scale.shape, generator=generator)).bfloat16()

    for name in layers:
        edit(directory, f"{name}.weight_scale", multiples)
    to_version_2(directory)


def shards(directory: Path, group: str) -> list[str]:
    return read_spec(directory).shared_inputs()[group]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def outputs(directory: Path, name: str) -> Tensor:
    """The reference's output of one layer for generated tokens of every row."""
    spec = read_spec(directory)
    tensors = load_layer(directory, check_headers(directory, spec), name, spec)
    x = torch.randn(40, spec.layers[name].in_features, generator=torch.Generator().manual_seed(3)) * 4
    rows = torch.arange(40, dtype=torch.int32) % (len(DEFAULT_ROWS) - 1)
    return linear(x, rows, weight_of(tensors), activation_of(tensors))


def refused(directory: Path, output: Path, *fragments: str, **settings: Any) -> None:
    """One line names the thing, and no file is left behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(MorphoQuantError) as caught:
        convert(directory, output, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert sorted(output.parent.iterdir()) == before


def test_every_file_but_the_config_stays_byte_for_byte(old: Path, tmp_path: Path) -> None:
    done = convert(old, tmp_path / "new")
    assert str(done) == "format_version 3, 14 quantized layers"
    before, after = contents(old), contents(tmp_path / "new")
    assert before.pop(CONFIG) != after.pop(CONFIG)
    assert after == before
    spec = verify_checkpoint(tmp_path / "new")
    assert spec.integrity is not None
    assert spec.layers == read_spec(old).layers and spec.created_by == read_spec(old).created_by


def test_files_behind_links_to_folders_are_copied(old: Path, tmp_path: Path) -> None:
    """Without its step's settings an embedding model would pool another vector."""
    (old / "steps").mkdir()
    (old / "steps" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (old / "1_Pooling").symlink_to("steps")
    (old / "steps" / "back").symlink_to(old)
    (old / "modules.json").write_text('[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]')
    convert(old, tmp_path / "new")
    assert (tmp_path / "new" / "1_Pooling" / "config.json").read_bytes() == (old / "steps/config.json").read_bytes()
    assert {"modules.json", "1_Pooling/config.json"} <= read_spec(tmp_path / "new").integrity.beside.keys()
    assert not (tmp_path / "new" / "steps" / "back").exists()


def test_other_fields_of_the_config_stay(old: Path, tmp_path: Path) -> None:
    convert(old, tmp_path / "new")
    before, after = (json.loads((place / CONFIG).read_text()) for place in (old, tmp_path / "new"))
    before.pop("quantization_config"), after.pop("quantization_config")
    assert after == before


def test_what_is_converted_is_a_copy(old: Path, tmp_path: Path) -> None:
    """Whoever deletes or edits the old one does not touch the new one."""
    convert(old, tmp_path / "new")
    for path in old.rglob("*.safetensors"):
        path.write_bytes(b"overwritten in place")
    verify_checkpoint(tmp_path / "new")


@pytest.mark.parametrize("version", [1, 4, "3", None])
def test_an_unknown_version_is_refused_with_those_that_are_known(old: Path, tmp_path: Path, version: object) -> None:
    config = json.loads((old / CONFIG).read_text())
    config["quantization_config"]["format_version"] = version
    (old / CONFIG).write_text(json.dumps(config))
    refused(old, tmp_path / "new", f"format_version {version!r} is unknown", "knows 2 and 3")


def test_version_3_leaves_nothing_to_do(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "old", two_level=(GATE_UP,))
    refused(tmp_path / "old", tmp_path / "new", "format_version 3 already", "nothing to do", "--scales two-level")
    refused(tmp_path / "old", tmp_path / "new", "12 layers are not integer", "--approximate", scales="two-level")


def test_two_level_already(tmp_path: Path) -> None:
    groups = write_random_checkpoint(tmp_path / "old").shared_inputs()
    write_random_checkpoint(tmp_path / "old", two_level=tuple(groups))
    refused(tmp_path / "old", tmp_path / "new", "has two-level scales already", scales="two-level")


def test_bad_settings(old: Path, tmp_path: Path) -> None:
    refused(old, tmp_path / "new", "--scales 'three' is unknown; known: two-level", scales="three")
    refused(old, tmp_path / "new", "pass --scales two-level, too", approximate=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").touch()
    refused(old, tmp_path / "new", "exists and is not empty")
    refused(old, old / "new", "overlap")


def test_exact_scales_become_two_level_and_the_numbers_stay(old: Path, tmp_path: Path) -> None:
    names = [*shards(old, QKV), DOWN]
    make_exact(old, names)
    done = convert(old, tmp_path / "new", scales="two-level")
    assert sorted(done.exact) == sorted(names) and not done.errors and len(done.left) == 14 - 2 - 4
    assert str(done) == "format_version 3, 14 quantized layers, 4 made two-level exactly, 8 left with group scales"
    spec = verify_checkpoint(tmp_path / "new")
    for name, layer in spec.layers.items():
        two_level = name in names or layer.shared_input == GATE_UP
        assert layer.scale_scheme == (TWO_LEVEL_SCHEME if two_level else GROUP_SCHEME)
        assert torch.equal(outputs(tmp_path / "new", name), outputs(old, name)), name
    before, after = all_tensors(old), all_tensors(tmp_path / "new")
    for name in names:
        scale = before.pop(f"{name}.weight_scale")
        level, unit = (after.pop(f"{name}.{tensor}") for tensor in ("weight_level", "weight_channel_scale"))
        assert torch.equal(level.float() * unit[:, None], scale.float())
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype is tensor.dtype and torch.equal(after[name], tensor), name


def test_files_in_which_nothing_changes_are_copied(old: Path, tmp_path: Path) -> None:
    make_exact(old, [DOWN])
    convert(old, tmp_path / "new", scales="two-level")
    changed = {name for name, content in contents(old).items() if contents(tmp_path / "new").get(name) != content}
    assert changed == {CONFIG, INDEX, "model-00001-of-00002.safetensors"}


def test_metadata_and_total_size_are_those_of_the_new_files(old: Path, tmp_path: Path) -> None:
    make_exact(old, [DOWN])
    index = json.loads((old / INDEX).read_text())
    (old / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 1, "other": 2}}))
    convert(old, tmp_path / "new", scales="two-level")
    size = sum(tensor.nbytes for tensor in all_tensors(tmp_path / "new").values())
    assert json.loads((tmp_path / "new" / INDEX).read_text())["metadata"] == {"total_size": size, "other": 2}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        with safe_open(old / name, "pt") as before, safe_open(tmp_path / "new" / name, "pt") as after:
            assert after.metadata() == before.metadata()


def test_shards_of_one_input_change_together_or_not_at_all(old: Path, tmp_path: Path) -> None:
    make_exact(old, [Q, DOWN])
    done = convert(old, tmp_path / "new", scales="two-level")
    assert done.exact == (DOWN,) and Q in done.left


def test_version_3_takes_two_level_scales(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "old")
    make_exact(tmp_path / "old", [DOWN])
    convert(tmp_path / "old", tmp_path / "third")
    assert convert(tmp_path / "third", tmp_path / "new", scales="two-level").exact == (DOWN,)
    assert verify_checkpoint(tmp_path / "new").layers[DOWN].scale_scheme == TWO_LEVEL_SCHEME


def test_approximate_refits_what_has_no_exact_scales(old: Path, tmp_path: Path) -> None:
    make_exact(old, [Q])
    done = convert(old, tmp_path / "new", scales="two-level", approximate=True)
    assert done.exact == (Q,) and not done.left and len(done.errors) == 11
    assert all(0 < error < 0.05 for error in done.errors.values())
    assert "11 refitted to two-level scales (relative weight error " in str(done)
    assert f"{max(done.errors.values()):.2%} at most" in str(done)
    spec = verify_checkpoint(tmp_path / "new")
    assert {layer.scale_scheme for layer in spec.layers.values()} == {TWO_LEVEL_SCHEME}
    before, after = all_tensors(old), all_tensors(tmp_path / "new")
    assert torch.equal(after[stored_name(DOWN, "absorbed_bias")], before[stored_name(DOWN, "absorbed_bias")])
    for name in spec.layers:
        expected, found = outputs(old, name), outputs(tmp_path / "new", name)
        assert float((found - expected).norm() / expected.norm()) < 0.05, name
    assert torch.equal(outputs(tmp_path / "new", Q), outputs(old, Q))


@pytest.mark.parametrize("file", [0, 1])
def test_a_layer_whose_tensors_lie_in_two_files(old: Path, tmp_path: Path, file: int) -> None:
    """Codes and scales are refitted alike, whichever file comes first."""
    places = sorted(old.glob("*.safetensors"))
    index = json.loads((old / INDEX).read_text())
    held = [load_file(path) for path in places]
    name = stored_name(DOWN, "weight_scale" if file else "weight_codes")
    tensor = next(tensors.pop(name) for tensors in held if name in tensors)
    other = stored_name(DOWN, "weight_codes" if file else "weight_scale")
    target = next(number for number, tensors in enumerate(held) if other not in tensors)
    held[target][name] = tensor
    for path, tensors in zip(places, held, strict=True):
        save_file(tensors, path)
    index["weight_map"][name] = places[target].name
    (old / INDEX).write_text(json.dumps(index))
    done = convert(old, tmp_path / "new", scales="two-level", approximate=True)
    expected, found = outputs(old, DOWN), outputs(tmp_path / "new", DOWN)
    assert DOWN in done.errors and float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("damage", ["nan", "truncated", "missing"])
def test_damage_of_the_old_checkpoint_is_refused(old: Path, tmp_path: Path, damage: str) -> None:
    name = "model.norm.weight"
    if damage == "nan":
        edit(old, name, lambda tensor: tensor.fill_(float("nan")))
        to_version_2(old)
        refused(old, tmp_path / "new", name, "holds NaN")
    elif damage == "truncated":
        path = old / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        refused(old, tmp_path / "new", path.name, "truncated")
    else:
        (old / "model-00001-of-00002.safetensors").unlink()
        refused(old, tmp_path / "new", "missing")


def test_a_run_that_is_interrupted_leaves_nothing(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(old, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_an_output_that_does_not_verify_gets_no_name(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_exact(old, [DOWN])
    levels = torch.zeros(64, 4, dtype=torch.uint8), torch.ones(64)
    monkeypatch.setattr(module, "exact_levels", lambda scale: levels if scale.shape[1] == 4 else None)
    refused(old, tmp_path / "new", "weight_level: every level must be 1 to 16", scales="two-level")


def test_an_older_checkpoint_is_replaced_if_asked(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old, tmp_path / "new")
    refused(old, tmp_path / "new", "pass --overwrite")
    convert(old, tmp_path / "new", overwrite=True)
    assert read_spec(tmp_path / "new").integrity is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("approximate", [False, True])
def test_the_experts_of_a_list_change_together(tmp_path: Path, approximate: bool) -> None:
    old = tmp_path / "old"
    write_random_checkpoint(old, layers=1, experts={EXPERTS: ExpertsSpec(2, 64, 128, 32)})
    names = list(read_spec(old).experts[EXPERTS].layers(EXPERTS))
    # One linear of the list has random scales.
    make_exact(old, names[:-1] if approximate else names)
    result = convert(old, tmp_path / "new", scales="two-level", approximate=approximate)
    spec = verify_checkpoint(tmp_path / "new")
    assert spec.experts[EXPERTS].scale_scheme == TWO_LEVEL_SCHEME
    assert set(names[:-1]) <= set(result.exact)
    assert (names[-1] in result.errors) is approximate and (names[-1] in result.exact) is not approximate
    assert result.layers == 7 + len(names)


def test_experts_stay_if_one_of_them_has_no_exact_levels(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write_random_checkpoint(old, layers=1, experts={EXPERTS: ExpertsSpec(2, 64, 128, 32)})
    names = list(read_spec(old).experts[EXPERTS].layers(EXPERTS))
    make_exact(old, [*names[:-1], DOWN])
    result = convert(old, tmp_path / "new", scales="two-level")
    assert set(names) <= set(result.left) and DOWN in result.exact
    assert verify_checkpoint(tmp_path / "new").experts[EXPERTS].scale_scheme == GROUP_SCHEME
