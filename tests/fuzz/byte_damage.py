"""Damage to the bytes of a file, as disks, networks and interrupted copies do it."""

import json
from pathlib import Path
from random import Random

_TELLING = b'\x00\xff\x7f\x80"{}[],:\\\n-1e'
_LONGEST_PIECE = 64


def damage_bytes(path: Path, random: Random) -> str:
    """Change the file's bytes in one way; a description of the change."""
    content = path.read_bytes()
    start = _place(content, path, random)
    length = 1 + random.randrange(_LONGEST_PIECE)
    piece = content[start : start + length]
    kind = random.choice(("flip", "set", "insert", "delete", "truncate", "repeat", "append", "zero", "swap"))
    match kind:
        case "flip":
            changed = bytes([byte ^ (1 << random.randrange(8)) for byte in piece[:1]])
            content = content[:start] + changed + content[start + 1 :]
        case "set":
            content = content[:start] + bytes([random.choice(_TELLING)]) + content[start + 1 :]
        case "insert":
            new = random.randbytes(length) if random.random() < 0.5 else bytes(random.choices(_TELLING, k=length))
            content = content[:start] + new + content[start:]
        case "delete":
            content = content[:start] + content[start + length :]
        case "truncate":
            content = content[:start]
        case "repeat":
            content = content[:start] + piece + content[start:]
        case "append":
            content += random.randbytes(length)
        case "zero":
            content = content[:start] + bytes(len(piece)) + content[start + length :]
        case "swap":
            other = random.randrange(len(content) + 1)
            low, high = sorted((start, other))
            content = content[:low] + content[high:] + content[low:high]
    path.write_bytes(content)
    return f"{path.name}: {kind} at byte {start}, length {length}"


def _place(content: bytes, path: Path, random: Random) -> int:
    """Somewhere in the file; in a safetensors file half of the places lie in the header, which is short."""
    end = len(content)
    if path.suffix == ".safetensors" and end >= 8 and random.random() < 0.5:
        end = min(end, 8 + int.from_bytes(content[:8], "little"))
    return random.randrange(end + 1)


def read_header(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header as JSON holds it, and its data. ValueError or KeyError where it has none."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, text: str, data: bytes) -> None:
    """A safetensors file of any header."""
    header = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
