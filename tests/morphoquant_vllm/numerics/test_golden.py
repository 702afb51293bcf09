"""The reference reproduces the authors' quantizer; a copy of the recording that is wrong anywhere is reported."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.numerics.golden import Difference, compare, main

GOLDEN = Path(__file__).parents[2] / "data" / "reference_act_dev.safetensors"
CASE = 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small elementwise work: threads that wait for a busy core make it several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corrupted(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of the golden file with one tensor changed; it lists case 1 only, which keeps the replay short."""
    with safe_open(str(GOLDEN), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["meta"])
    meta["cases"] = [case for case in meta["cases"] if case["id"] == CASE]
    assert meta["cases"]
    tensors[name] = change(tensors[name].clone())
    path = directory / "golden.safetensors"
    save_file(tensors, path, {"meta": json.dumps(meta)})
    return path


def test_recorded_ranges_masks_and_outputs_are_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "cases agree" in printed.splitlines()[-1]
    assert "DIFFER" not in printed
    with safe_open(str(GOLDEN), "pt") as file:
        recorded = sum(name.split(".", 1)[0].isdigit() for name in file.keys())  # noqa: SIM118
    assert len(printed.splitlines()) == recorded + 1, "every recorded tensor of every case has its line"


def flip_one(mask: Tensor) -> Tensor:
    mask.view(-1)[17] = ~mask.view(-1)[17].bool()
    return mask


def one_ulp(output: Tensor) -> Tensor:
    flat = output.view(-1)
    at = int(flat.abs().argmax())
    flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf))
    return output


def widen_one(edge: Tensor) -> Tensor:
    edge[3] *= 1.01
    return edge


def spoil_one(output: Tensor) -> Tensor:
    output.view(-1)[5] = torch.nan
    return output


@pytest.mark.parametrize(
    ("tensor", "change", "difference"),
    [
        ("mask", flip_one, "1"),
        ("output", one_ulp, None),
        ("output", spoil_one, "inf"),
        ("range_max", widen_one, None),
        ("dispersion", widen_one, None),
    ],
)
def test_corrupted_copy_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tensor: str,
    change: Callable[[Tensor], Tensor],
    difference: str | None,
) -> None:
    name = f"{CASE}.{tensor}"
    with safe_open(str(GOLDEN), "pt") as file:
        recorded = file.get_tensor(name)
    path = corrupted(tmp_path, name, change)
    if difference is None:
        gap = (change(recorded.clone()).double() - recorded.double()).abs().max().item()
        assert gap > 0
        # The reference equals the recording, but for the dispersion, which it meets to 1e-5: compare fewer digits.
        difference = f"{gap:.6g}" if tensor != "dispersion" else f"{gap:.2g}"
    assert main([str(path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: 1 of ")
    assert f"largest difference {difference}" in last
    assert f"case {CASE} {tensor}" in last


def test_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOLDEN.read_bytes()[:100_000])
    refused(path, capsys)


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "nowhere.safetensors", capsys)


def test_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, capsys)


def test_garbage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(b"not safetensors at all" * 10)
    refused(path, capsys)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"meta": "{"}, {"meta": "[]"}, {"meta": '{"cases": []}'}, {"meta": '{"cases": [{"id": 0}]}'}]
)
def test_safetensors_that_are_no_golden_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata)
    refused(path, capsys)


def test_inputs_of_unlike_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(str(GOLDEN), "pt") as file:
        layer = next(case["name"] for case in json.loads(file.metadata()["meta"])["cases"] if case["id"] == CASE)
    refused(corrupted(tmp_path, f"{layer}.x1", lambda x: x[:, :-1].contiguous()), capsys)


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the file."""
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"error: {path}: not a golden file")


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_compare_refuses_another_shape_and_allows_the_dispersion_its_tolerance() -> None:
    with pytest.raises(MorphoQuantError, match=r"case 4: mask has shape \[3\], expected \[2\]"):
        compare(4, "layer", "mask", torch.zeros(2), torch.zeros(3))
    near = torch.tensor([1.0 + 5e-6])
    assert compare(0, "layer", "dispersion", near, torch.ones(1)).within
    found = compare(0, "layer", "range_min", near, torch.ones(1))
    assert not found.within
    assert isinstance(found, Difference)
    assert found.elements == 1
