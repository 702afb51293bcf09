"""silu(gate) * up inside the quantizer, interpreted; and how many kernels a layer launches with and without it."""

import ast
from pathlib import Path

import pytest
import torch

from benchmarks.models.shapes import GPU_LAYERS
from morphoquant_vllm.gpu import layout, tiles
from tests.morphoquant_vllm.gpu import cases, served
from tests.morphoquant_vllm.gpu.cases import Case
from tests.morphoquant_vllm.gpu.interpreter import Interpreter


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 32, 64, 32),
        Case(7, 32, 1088, 32, dtype=torch.float16, blocks=2),
        Case(17, 32, 1088, 64),
        Case(16, 32, 384, 128, blocks=3),
        Case(5, 32, 96, 32, dtype=torch.float32),
        Case(131, 32, 128, 32, blocks=2),
        Case(3, 32, 96, 32, in_order=True),
        Case(131, 32, 1152, 32, in_order=True),
    ],
    ids=str,
)
def test_codes_are_those_of_torch_s_silu_and_mul(interpreter: Interpreter, case: Case) -> None:
    """All of them: two float32 exponentials differ in the last bits, and none of these values is so near a tie."""
    found = interpreter(cases.silu_mul, case)
    assert found.other_inputs == 0
    assert found.rows_equal
    assert found.massive == -(-case.tokens // 3)
    assert found.escapes > 0


@pytest.mark.parametrize(("case", "architecture"), [(Case(1, 144, 576, 64), "sm_90"), (Case(20, 70, 96, 32), "sm_89")])
def test_the_fused_op_gives_the_bits_of_the_two_steps(interpreter: Interpreter, case: Case, architecture: str) -> None:
    assert interpreter(served.fused, case, architecture)


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize(("units", "reductions"), [(1, 0), (8, 1)])
def test_launches_of_a_layer(interpreter: Interpreter, silu_mul: bool, units: int, reductions: int) -> None:
    """The fused op launches what the plain one does: the kernel of silu(gate) * up is what goes."""
    found = interpreter(served.launches, Case(1, 256, 1024, 64), "sm_90", units, silu_mul)
    assert found == dict.fromkeys(served.KERNELS, 0) | {
        "quantize_activation": 1,
        "int4_gemm": 1,
        "reduce_splits": reductions,
    }


@pytest.mark.parametrize(
    ("tokens", "in_order", "kernel"),
    [
        (127, True, "quantize_activation"),
        (128, True, "quantize_in_order"),
        (127, False, "quantize_activation"),
        (128, False, "quantize_tokens"),
    ],
)
def test_which_quantizer_is_launched(interpreter: Interpreter, tokens: int, in_order: bool, kernel: str) -> None:
    case = Case(tokens, 32, 64, 64, in_order=in_order)
    found = interpreter(served.launches, case, "sm_90", 1, False)
    assert [name for name, count in found.items() if name.startswith("quantize") and count] == [kernel]


def test_no_kernel_is_launched_but_those_that_are_counted() -> None:
    """A launch is described by `Launch`, and made in launcher.py alone."""
    folder = Path(layout.__file__).parent
    imported, launching = set(), set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("morphoquant_vllm.gpu.kernels"):
                imported |= {(alias.name, path.stem) for alias in node.names}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value).rpartition(".")[2]
                launching |= {path.stem} if name == "kernel" or name in served.KERNELS else set()
    # Gluon has no interpreter, and no shipped table chooses its kernel.
    others = {("fused_int8", "int8_path"), ("eight_bit_head", "head")}
    # Experts are launched in a room of their own, which test_experts.py interprets.
    others |= {(name, "experts") for name in ("quantize_pairs", "experts_gemm", "add_pairs")}
    assert imported == set(served.KERNELS.items()) | others
    assert launching == {"launcher"}


@pytest.mark.parametrize(
    ("architecture", "units", "expected"),
    [
        ("sm_90", 132, {"qkv": 3, "o": 3, "gate_up": 2, "down": 3}),
        ("sm_89", 92, {"qkv": 3, "o": 3, "gate_up": 2, "down": 3}),
    ],
    ids=["H100", "L20"],
)
def test_launches_of_a_7b_decoder_layer(architecture: str, units: int, expected: dict[str, int]) -> None:
    """What docs/design/kernels_gpu.md says, for one token at G = 32."""
    tile = tiles.load(tiles.DEFAULT_TABLE)[architecture].tile(1, 32)
    found = {}
    for name in expected:
        out_features, in_features = GPU_LAYERS[name]
        splits = tiles.splits_of(tile, 1, out_features, in_features // layout.tile_channels(32), units)
        found[name] = 2 + (splits > 1)
    assert found == expected
