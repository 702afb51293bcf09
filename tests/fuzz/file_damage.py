"""Damage to the directory: files that are gone, doubled, in each other's place, or no files at all."""

import os
import shutil
import socket
from pathlib import Path
from random import Random

_NEW_NAMES = (
    *("model.safetensors", "extra.safetensors", "consolidated.safetensors", "model-00003-of-00003.safetensors"),
    *("pytorch_model.bin", "notes.txt", "[red]x.safetensors", "a\nb.safetensors", "\x1b[31m.safetensors"),
    *("model.safetensors.index.json.bak", "config.json~", "model.SAFETENSORS", ".safetensors", ".hidden.safetensors"),
)


def damage_place(directory: Path, path: Path, random: Random) -> str:
    """Change what lies at `path`, a file of the directory, or beside it; a description of the change."""
    kinds = ("missing", "empty", "fifo", "directory", "dangling", "loop", "device", "socket", "elsewhere", "swapped")
    kind = random.choice((*kinds, "renamed", "extra", "extra", "extra fifo", "extra directory", "hard link"))
    other = directory / random.choice(_NEW_NAMES)
    if kind.startswith("extra") or kind in ("renamed", "hard link"):
        if other.exists():
            return f"{path.name}: {other.name!r} exists"
        match kind:
            case "renamed":
                path.rename(other)
            case "extra":
                shutil.copyfile(path, other)
            case "extra fifo":
                os.mkfifo(other)
            case "extra directory":
                other.mkdir()
            case "hard link":
                os.link(path, other)
        return f"{path.name}: {kind} {other.name!r}"
    if kind == "swapped":
        files = sorted(place for place in path.parent.iterdir() if place.is_file() and not place.is_symlink())
        second, between = random.choice(files), path.with_name("between")
        path.rename(between)
        if second != path:
            second.rename(path)
        between.rename(second)
        return f"{path.name}: swapped with {second.name}"
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "empty":
            path.touch()
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "dangling":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to(random.choice(("/dev/null", "/dev/zero", "/dev/random")))
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "elsewhere":
            # As a hub's cache holds it: a link to a good file.
            store = directory / "blobs"
            store.mkdir(exist_ok=True)
            (store / path.name).write_bytes(content)
            path.symlink_to(store / path.name)
    return f"{path.name}: {kind}"
