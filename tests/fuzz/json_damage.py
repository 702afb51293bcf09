"""Damage to the content of JSON, as by faulty writers, merges and other tools."""

import copy
import json
from random import Random
from typing import Any

# Text that json.dumps does not write stands behind these marks until the end.
_RAW = {
    "@deep@": "[" * 20_000 + "]" * 20_000,
    "@deep object@": '{"a":' * 200 + "1" + "}" * 200,
    "@digits@": "9" * 5_000,
    "@nan@": "NaN",
    "@infinity@": "Infinity",
    "@minus infinity@": "-Infinity",
    "@1e999@": "1e999",
    "@surrogate@": '"\\ud800 \\udfff"',
    "@minus zero@": "-0",
    "@no json@": "tru",
}
_VALUES = (
    *_RAW,
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 64, 0.5, -0.0, 1e300, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *("", "any", "text", "massive", "group", "two_level", "row", "column", "model.layers.0.self_attn.o_proj"),
    *(
        "a\nb",
        "\x1b[31mred",
        "\x00",
        "[/red] [bold]",
        "<script>alert(1)</script>",
        "{{ 1 / 0 }}",
        "../x",
        "x" * 100_000,
    ),
    *("\u202e", "\u0661", "9" * 5_000, "model-00001-of-00002.safetensors", "/etc/passwd", "n" * 300 + ".safetensors"),
    # Half a character and a zero byte, which no file's name has; mathematics, which matplotlib sets.
    *("\ud800.safetensors", "a\x00b.safetensors", "$\\frac{$", "F8_E4M3", "F8_E8M0", "F4", "C64", "F64", "I64"),
    *([], {}, [[]], [None], {"": None}, [1, "a", {}], {"a": {"b": {"c": 1}}}, list(range(10_000))),
)
_STOP = 0.25


def damage_json(content: Any, random: Random) -> tuple[str, str]:
    """Change a JSON value in one way: the new text, and a description of the change."""
    content = copy.deepcopy(content)
    parent, key, where = _choose(content, random)
    if parent is None:
        value = random.choice(_VALUES)
        return _text(value), f"whole file becomes {_short(value)}"
    kinds = ["delete", "copy", "value", "value", "value", "near", "near", "wrap", "swap", "twice"]
    if isinstance(parent, dict):
        kinds += ["rename", "rename", "list of"]
    kind = random.choice(kinds)
    old = parent[key]
    new: Any = None
    match kind:
        case "delete":
            del parent[key]
        case "copy":
            _add(parent, old, random)
        case "value":
            new = parent[key] = copy.deepcopy(random.choice(_VALUES))
        case "near":
            new = parent[key] = _near(old, random)
        case "wrap":
            new = parent[key] = random.choice(([old], {"a": old}, str(old), {str(old)[:50]: old}))
        case "swap":
            other, name, _ = _choose(content, random)
            if other is not None:
                parent[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(old)
        case "rename":
            # The order of the others stays: only the name is another one.
            new = random.choice([*_names(random), *parent])
            renamed = {new if name == key else name: value for name, value in parent.items()}
            parent.clear()
            parent.update(renamed)
        case "list of":
            items = list(parent.items())
            parent.clear()
            parent["items"] = items
        case "twice":
            # A key that stands twice: readers take the last one.
            value = _text(random.choice(_VALUES))
            name = json.dumps(key if isinstance(content, dict) and key in content else "a")
            text = _text(content)
            if isinstance(content, dict) and len(text) > 2:
                early = random.random() < 0.5
                text = f"{{{name}:{value},{text[1:]}" if early else f"{text[:-1]},{name}:{value}}}"
            return text, f"{where}: stands twice, {value[:40]!r}"
    return _text(content), f"{where}: {kind} {_short(new)}"


def _choose(content: Any, random: Random) -> tuple[Any, Any, str]:
    """A random place: its container, its key there, and its path; no container for the whole."""
    parent, key, value, path = None, None, content, ""
    while isinstance(value, (dict, list)) and value:
        if (parent is None and random.random() < 0.02) or (parent is not None and random.random() < _STOP):
            break
        parent = value
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        # Containers are chosen more often: there is more to damage in them.
        full = [key for key in keys if isinstance(value[key], (dict, list)) and value[key]]
        key = random.choice(full if full and random.random() < 0.5 else keys)
        value, path = parent[key], f"{path}/{str(key)[:60]}"
    return parent, key, path


def _names(random: Random) -> list[str]:
    marked = [value for value in _VALUES if isinstance(value, str) and value not in _RAW]
    return [*random.sample(marked, 3), "integrity", "experts", "kv_cache", "weight_bits", "fixed_row", "layers"]


def _near(old: Any, random: Random) -> Any:
    """A value like the old one, of its type if possible."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice((old + 1, old - 1, -old, 2 * old, old // 2, float(old), str(old), old * 10**30))
    if isinstance(old, float):
        return random.choice((old * (1 + 2**-50), -old, old * 1e30, int(old), str(old)))
    if isinstance(old, str):
        at = random.randrange(len(old) + 1)
        return random.choice((old[:at], old + random.choice("x. \n\u00e9"), old[:at] + "_" + old[at:], old.upper()))
    if isinstance(old, list):
        return random.choice((old[::-1], old[1:], old + old, dict.fromkeys(map(str, old)), tuple(old)))
    if isinstance(old, dict):
        return random.choice((dict(reversed(old.items())), list(old), dict(list(old.items())[1:]), list(old.values())))
    return 0


def _add(parent: Any, value: Any, random: Random) -> None:
    if isinstance(parent, dict):
        parent[random.choice([*_names(random), "model.layers.1.self_attn.q_proj"])] = copy.deepcopy(value)
    else:
        parent.append(copy.deepcopy(value))


def _text(content: Any) -> str:
    try:
        # A number of 400 digits is written; one of 5,000 stands among the raw ones.
        text = json.dumps(content)
    except (RecursionError, ValueError):
        return "[]"
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def _short(value: Any) -> str:
    return ascii(value)[:60]
