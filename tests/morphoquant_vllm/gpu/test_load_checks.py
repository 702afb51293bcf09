"""What the GPU backend refuses at load: one line with the layer, the rule and the remedy. And who gets the backend."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from morphoquant_vllm import backends
from morphoquant_vllm.cpu import backend as cpu
from morphoquant_vllm.errors import MorphoQuantError
from morphoquant_vllm.gpu import device
from morphoquant_vllm.gpu import load_checks as checks
from morphoquant_vllm.numerics.weights import integer_codes
from tests.morphoquant_vllm.gpu.cases import Case, layer

NAME = "model.layers.3.mlp.down_proj"


def refusal(function, *args: object) -> str:
    with pytest.raises(MorphoQuantError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.startswith(NAME + ": ")
    assert "\n" not in message
    return message


def test_the_device_chooses_the_backend() -> None:
    assert backends.select_backend(torch.device("cpu")) == ("cpu" if cpu.available() else "reference")
    assert backends.select_backend(torch.device("cuda", 1)) == "triton"


def test_16_bit_activations_of_any_group_size_pass() -> None:
    for group_size in (32, 64, 128):
        weight, record = layer(Case(1, 40, 128, group_size))
        for dtype in (torch.bfloat16, torch.float16):
            checks.check_layer(NAME, weight, record, dtype)


def test_float32_activations_are_refused() -> None:
    weight, record = layer(Case(1, 32, 64, 32))
    assert "--dtype bfloat16" in refusal(checks.check_layer, NAME, weight, record, torch.float32)


def test_eight_bit_weights_are_refused_on_a_gpu() -> None:
    weight, record = layer(Case(1, 32, 64, 32))
    wide = weight._replace(codes=integer_codes(weight.codes))
    message = refusal(checks.check_layer, NAME, wide, record, torch.bfloat16)
    assert "weight_bits 8 is served on CPUs, not yet on GPUs" in message and "serve on a CPU" in message


@pytest.mark.parametrize(
    ("out_features", "in_features", "groups"), [(64, 96, 2), (64, 512, 2), (64, 100, 3), (64, 64, 0), (0, 64, 2)]
)
def test_other_groups_and_shapes_are_refused(out_features: int, in_features: int, groups: int) -> None:
    message = refusal(checks.check_shape, NAME, out_features, in_features, groups)
    remedies = ("[32, 64, 128]; calibrate again with one of them as --group-size", "leave this layer in 16 bit")
    assert any(remedy in message for remedy in remedies)


def test_tables_over_int32_are_refused() -> None:
    """Shapes alone, on torch's meta device."""
    weight, record = layer(Case(1, 32, 64, 32))
    huge = weight._replace(absorbed_bias=torch.empty(6, 2**29, device="meta"))
    assert "2^31" in refusal(checks.check_layer, NAME, huge, record, torch.bfloat16)


@pytest.mark.parametrize("capability", [(7, 5), (11, 0)])
def test_an_unknown_gpu_is_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    message = refusal(checks.check_device, NAME, torch.device("cuda", 0))
    assert f"GPU {capability[0]}.{capability[1]} is not served" in message
    assert "9.0" in message and "or on a CPU" in message


def test_a_known_gpu_gets_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=92))
    # Not through the cache, which would keep this GPU for other tests.
    profile = device.profile_of.__wrapped__(torch.device("cuda", 0))
    assert (profile.architecture.name, profile.units, profile.inline_assembly) == ("sm_89", 92, True)


def test_the_plugin_imports_no_triton() -> None:
    code = "import morphoquant_vllm.ops, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
