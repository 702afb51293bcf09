"""Routed experts in the model's files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.model.experts import check_served, counts_experts, find_experts, load_expert, load_merged
from calibration.model.source import Source, TensorInfo, open_source
from morphoquant_vllm.errors import MorphoQuantError

NAME = "m.experts"
# K = 2I: only the other tensor tells whether a merged one is transposed.
E, INNER, K = 3, 4, 8
GATE, UP = torch.randn(2, E, INNER, K, generator=torch.Generator().manual_seed(0))
DOWN = torch.randn(E, K, INNER, generator=torch.Generator().manual_seed(1))
MERGED = {"gate_up_proj": torch.cat((GATE, UP), 1), "down_proj": DOWN}
FORMS = {
    "separate": {
        f"{NAME}.{e}.{kind}.weight": weight[e].clone()
        for e in range(E)
        for kind, weight in (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN))
    },
    "merged": {f"{NAME}.{kind}": weight for kind, weight in MERGED.items()},
    "transposed": {f"{NAME}.{kind}": weight.transpose(1, 2).contiguous() for kind, weight in MERGED.items()},
}


def source_of(directory: Path, tensors: dict[str, Tensor]) -> Source:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return open_source(directory)


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_the_same_in_every_form_of_files(tmp_path: Path, form: str) -> None:
    source = source_of(tmp_path, FORMS[form])
    stored = find_experts(NAME, source.tensors)
    assert stored is not None
    assert (stored.count, stored.in_features, stored.intermediate_features) == (E, K, INNER)
    assert [name for names in stored.tensors.values() for name in names] and stored.tensors.keys() == FORMS[form].keys()
    assert {name for names in stored.tensors.values() for name in names} == set(stored.linears)
    for e in range(E):
        found = load_expert(source, stored, e, ("gate_proj", "up_proj", "down_proj"))
        assert all(
            torch.equal(found[kind], weight[e])
            for kind, weight in (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN))
        )
        assert list(load_expert(source, stored, e, ("up_proj",))) == ["up_proj"]
    for kind, weight in MERGED.items():
        merged = load_merged(source, stored, f"mlp.experts.{kind}", torch.device("cpu"), torch.bfloat16)
        assert torch.equal(merged, weight.bfloat16())


def test_files_without_such_experts_have_none(tmp_path: Path) -> None:
    assert find_experts(NAME, {}) is None
    other = {f"{NAME}.0.w1.weight": TensorInfo(tmp_path, "BF16", (4, 8))}
    assert find_experts(NAME, other) is None


@pytest.mark.parametrize(
    ("form", "change", "expected"),
    [
        ("separate", {f"{NAME}.1.up_proj.weight": None}, r"m.experts.1.up_proj.weight: missing; download"),
        ("separate", {f"{NAME}.2.down_proj.weight": (4, 8)}, r"m.experts.2.down_proj.weight: F32 \[4, 8\], not floats"),
        ("merged", {f"{NAME}.down_proj": None}, r"m.experts: gate_up_proj \[3, 8, 8\] and down_proj None are not"),
        ("merged", {f"{NAME}.down_proj": (2, 8, 4)}, r"down_proj \[2, 8, 4\] are not the weights of experts"),
        ("merged", {f"{NAME}.down_proj": (3, 8, 8)}, r"down_proj \[3, 8, 8\] are not the weights of experts"),
    ],
)
def test_experts_that_are_not_whole_are_refused_by_name(
    tmp_path: Path, form: str, change: dict[str, tuple[int, ...] | None], expected: str
) -> None:
    shapes = {name: tuple(value.shape) for name, value in FORMS[form].items()} | change
    tensors = {name: TensorInfo(tmp_path, "F32", shape) for name, shape in shapes.items() if shape is not None}
    with pytest.raises(MorphoQuantError, match=expected):
        find_experts(NAME, tensors)


@pytest.mark.parametrize(
    ("config", "extra", "expected"),
    [
        ({"hidden_act": "gelu"}, (), "activation is 'gelu', not silu"),
        ({}, (f"{NAME}.1.down_proj.bias",), "m.experts.1.down_proj.bias is a bias"),
        ({}, (f"{NAME}.gate_up_proj_bias",), "m.experts.gate_up_proj_bias is a bias"),
    ],
)
def test_other_kinds_of_experts_are_refused_with_the_remedy(
    tmp_path: Path, config: dict[str, object], extra: tuple[str, ...], expected: str
) -> None:
    form = "merged" if any("gate_up" in name for name in extra) else "separate"
    source = source_of(tmp_path, FORMS[form])
    stored = find_experts(NAME, source.tensors)
    assert stored is not None
    check_served(stored, source.tensors, {"hidden_act": "silu"})
    tensors = source.tensors | {name: TensorInfo(tmp_path, "BF16", (4,)) for name in extra}
    with pytest.raises(MorphoQuantError, match=rf"{expected}\); leave the experts in 16 bit with --ignore"):
        check_served(stored, tensors, config)


def test_a_config_counts_experts_at_any_depth() -> None:
    assert counts_experts({"a": {"text_config": {"num_experts": 8}}})
    assert not counts_experts({"num_local_experts": 0, "a": {"n_routed_experts": None}})


def test_one_expert_of_a_merged_tensor_is_read_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path, FORMS["merged"])
    whole = load_file(tmp_path / "model.safetensors")[f"{NAME}.down_proj"]
    assert torch.equal(source.load_part(f"{NAME}.down_proj", 2), whole[2])
