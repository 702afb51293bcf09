"""The inline assembly of two-level scales, executed here word by word: the interpreter runs its plain twin alone."""

import pytest

two_level = pytest.importorskip("morphoquant_vllm.gpu.kernels.gemm_two_level", reason="needs triton")

WORD = 2**32
# Operands in PTX are written: result, then one to three sources.
INSTRUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: (a * b + c) % WORD,
}


def execute(assembly: str, operands: dict[str, int]) -> int:
    """The value of $0 after a block of PTX."""
    values = dict(operands)
    for line in assembly.strip("{} ").removeprefix(".reg .b32 t; ").rstrip("; ").split("; "):
        opcode, _, rest = line.strip().partition(" ")
        result, *sources = rest.split(", ")
        values[result] = INSTRUCTIONS[opcode](*(values[s] if s in values else int(s, 0) for s in sources))
    return values["$0"]


@pytest.mark.parametrize(("name", "shift"), [("_LOW", 0), ("_HIGH", 4)])
def test_four_weights_are_multiplied_by_their_level(name: str, shift: int) -> None:
    """Every weight beside every other, in all four bytes, at every level; the other nibbles hold something else."""
    assembly = getattr(two_level, name).value
    for level in range(17):
        offset = (-0x7F7F7F80 - level * 0x08080808) % WORD
        for first in range(16):
            for second in range(16):
                nibbles = (first, second, 15 - first, second)
                others = (second, 15, first, 0)
                packed = bytes((n << shift) | (o << (4 - shift)) for n, o in zip(nibbles, others, strict=True))
                found = execute(assembly, {"$1": int.from_bytes(packed, "little"), "$2": level, "$6": offset})
                signed = [byte - 256 if byte > 127 else byte for byte in found.to_bytes(4, "little")]
                assert signed == [(nibble - 8) * level for nibble in nibbles]
