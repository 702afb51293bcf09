"""The output of `morphoquant inspect` for a checkpoint."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from calibration.output.inspection import inspect_data, inspect_table, percent
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.format.checkpoint import check_headers, load_layer, read_spec
from morphoquant_vllm.format.files import REPORT_FILE
from morphoquant_vllm.format.layers import ExpertsSpec
from tests.checkpoints import HIDDEN, VOCABULARY, write_config, write_random_checkpoint

Q = "model.layers.0.self_attn.q_proj"
RATE = 0.0123


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    spec = write_random_checkpoint(directory)
    layers = {
        name: {"escape_rate": {"text": 0.01, "image": 0.04, "all": 0.02}, "output_error": 0.125} for name in spec.layers
    }
    layers[Q]["modality_rows"] = {"text": {"own": False}, "image": {"own": True}, "audio": {"own": True}}
    sidecar = {"escape_rate": RATE, "layers": layers, "data": {}, "settings": {}}
    (directory / REPORT_FILE).write_text(json.dumps(sidecar))
    return directory


def render(directory: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(inspect_table(directory))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_layer_data(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)
    tensors = load_layer(checkpoint, check_headers(checkpoint, spec), Q, spec)
    layer = next(layer for layer in inspect_data(checkpoint)["layers"] if layer["name"] == Q)
    assert (layer["out_features"], layer["in_features"], layer["group_size"]) == (HIDDEN, HIDDEN, 32)
    assert layer["masked_channels"] == {
        row: int(tensors["modality_mask"][index].sum()) for index, row in enumerate(spec.rows)
    }
    assert layer["masked_channels"]["any"] > 0
    assert layer["escape_rate"] == {"text": 0.01, "image": 0.04, "all": 0.02}
    assert layer["output_error"] == 0.125
    assert layer["own_rows"] == ["image", "audio"]
    assert layer["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert layer["bytes_16bit"] == 2 * HIDDEN * HIDDEN + 2 * HIDDEN


def test_totals(checkpoint: Path) -> None:
    data = inspect_data(checkpoint)
    totals = data["totals"]
    stored = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118
            stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert totals["layers"] == len(data["layers"]) == 14
    assert totals["bytes"] == stored
    assert totals["quantized_bytes"] == sum(layer["bytes"] for layer in data["layers"])
    rest = 2 * VOCABULARY * HIDDEN + 2 * HIDDEN  # embeddings and norm
    assert totals["bytes"] - totals["quantized_bytes"] == rest
    assert totals["bytes_16bit"] == totals["quantized_bytes_16bit"] + rest
    assert totals["escape_rate"] == RATE
    assert totals["effective_activation_bits"] == pytest.approx(4 + 4 * RATE)


def test_data_is_json(checkpoint: Path) -> None:
    data = inspect_data(checkpoint)
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_fits_the_terminal_and_loses_nothing(checkpoint: Path, width: int) -> None:
    shown = render(checkpoint, width)
    assert max(map(len, shown.splitlines())) <= width
    for fragment in ("layers below model.layers.", "0.self_attn.q_proj", "1.mlp.down_proj", "64x128", "2.00%"):
        assert fragment in shown
    masked = inspect_data(checkpoint)["layers"][0]["masked_channels"].values()
    assert "/".join(map(str, masked)) in shown
    assert "escape rate in calibration: 1.23%" in shown
    assert "effective activation bits: 4.05" in shown
    assert "…" not in shown


def test_rows_of_modalities_are_counted(checkpoint: Path) -> None:
    layers = len(inspect_data(checkpoint)["layers"])
    assert f"modality-specific row, of {layers}: image 1, audio 1" in render(checkpoint)


def test_missing_report_is_shown_as_such(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    data = inspect_data(tmp_path)
    assert data["calibration_report"] is None
    assert data["totals"]["escape_rate"] is None
    assert data["layers"][0]["escape_rate"] is None
    shown = render(tmp_path)
    assert f"{REPORT_FILE} is missing" in shown
    assert " - " in shown


def test_figures_are_never_broken_at_80_columns(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = inspect_data(checkpoint)
    # The widest that Qwen2.5-Omni-7B has, under names that do not share their beginning.
    figures = {"out_features": 18944, "in_features": 18944, "group_size": 128, "bytes": 2**29, "bytes_16bit": 2**29}
    for layer in data["layers"]:
        layer["name"] = layer["name"].replace("model.layers.", "thinker.model.layers.2")
        layer |= figures | {"masked_channels": dict.fromkeys(data["rows"], 18944), "escape_rate": {"all": 1.0}}
    data["layers"][0]["name"] = "talker.model.layers.0.self_attn.q_proj"
    monkeypatch.setattr("calibration.output.inspection.inspect_data", lambda directory: data)
    lines = render(checkpoint, 80).splitlines()
    assert max(map(len, lines)) <= 80
    pattern = r"18944x18944 +128 +18944 +100\.00% +512\.0 MiB +100\.00%"
    assert sum(bool(re.search(pattern, line)) for line in lines) == len(data["layers"])
    # Names are wrapped, in full, into the remaining width.
    names = "".join(re.split(r" +(?=18944x)|\s*$", line.strip())[0] for line in lines)
    assert all(layer["name"] in names for layer in data["layers"])


def test_damaged_report(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / REPORT_FILE).write_text("{")
    with pytest.raises(MorphoQuantError, match=f"{REPORT_FILE}: cannot be read as JSON"):
        inspect_data(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MorphoQuantError, match="plain model"):
        inspect_table(tmp_path)


def test_two_level_scales_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, two_level=["model.layers.0.self_attn.qkv_proj"])
    schemes = {layer["name"]: layer["scale_scheme"] for layer in inspect_data(tmp_path)["layers"]}
    assert [name.rsplit(".", 1)[1] for name in schemes if schemes[name] == "two_level"] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert "two-level weight scales: 3 of 14 layers" in render(tmp_path)
    assert "two-level" not in render(checkpoint)


def test_bits_of_weights_are_shown(checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, eight_bit=["model.layers.0.self_attn.qkv_proj"])
    bits = {"budget": 4.6, "mean": 4.58, "eight_bit": [], "sixteen_bit": ["model.layers.1.mlp.gate_up_proj"]}
    (tmp_path / REPORT_FILE).write_text(json.dumps({"bits": bits}))
    data = inspect_data(tmp_path)
    assert [layer["weight_bits"] for layer in data["layers"][:4]] == [8, 8, 8, 4] and data["bits"] == bits
    shown = " ".join(render(tmp_path, 300).split())
    assert "8-bit weights: 3 of 14 layers; served on CPUs only" in shown
    assert "4.580 (bits_budget 4.6); in 16 bit: model.layers.1.mlp.gate_up_proj" in shown
    assert re.search(r"0\.self_attn\.q_proj +64x64 +8 +32", render(tmp_path))
    assert "bits " not in render(checkpoint).splitlines()[2] and "8-bit" not in render(checkpoint)


def test_a_row_of_another_name_is_shown(tmp_path: Path) -> None:
    spec = write_random_checkpoint(tmp_path)
    renamed = replace(spec, rows=("smell", *spec.rows[1:]))
    write_config(tmp_path, renamed)
    assert "in rows smell/image/video" in render(tmp_path)


def test_figures_of_any_size_are_written_short() -> None:
    assert [percent(share) for share in (None, 0, 1.5, 3e38)] == ["-", "0.00%", "150.00%", "3e+40%"]


def test_experts_have_a_line_and_their_figures(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts"
    spec = write_random_checkpoint(tmp_path, experts={name: ExpertsSpec(3, HIDDEN, 64, 32)})
    figures = {
        "tokens": [9, 4, 0],
        "drawn_tokens": [7, 2, 0],
        "few": 2,
        "none": 1,
        "input": {"escape_rate": {"text": 0.03, "all": 0.03}, "output_error": 0.2},
        "gate_up_error": [0.1, 0.2, None],
        "down_error": [0.3, 0.4, None],
        "down_escape_rate": [0.01, 0.02, None],
    }
    sidecar = {"escape_rate": RATE, "layers": {}, "experts": {name: figures}}
    (tmp_path / REPORT_FILE).write_text(json.dumps(sidecar))
    data = inspect_data(tmp_path)
    (experts,) = data["experts"]
    assert (experts["count"], experts["few"], experts["none"]) == (3, 2, 1)
    assert experts["down_error"] == [0.3, 0.4, None]
    assert experts["bytes_16bit"] == 2 * 3 * 3 * HIDDEN * 64
    stored = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            tensors = (file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}."))  # noqa: SIM118
            stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert experts["bytes"] == stored
    assert data["totals"]["experts"] == 3
    assert data["totals"]["quantized_bytes"] == stored + sum(layer["bytes"] for layer in data["layers"])
    text = render(tmp_path)
    assert "1.mlp.experts (3)" in text and f"64x{HIDDEN}" in text
    assert f"quantized layers: {len(spec.layers)} and 3 experts" in text
    assert "drawn tokens of an expert: 0 to 7, 2 in the" in text and "2 had few, 1 none" in " ".join(text.split())


@pytest.mark.parametrize(("field", "value"), [("tokens", [-1]), ("down_error", ["x"]), ("few", 0.5)])
def test_damaged_figures_of_experts_are_named(tmp_path: Path, field: str, value: object) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / REPORT_FILE).write_text(json.dumps({"layers": {}, "experts": {"m.experts": {field: value}}}))
    with pytest.raises(MorphoQuantError, match=rf"experts.m.experts.{field}"):
        inspect_data(tmp_path)
