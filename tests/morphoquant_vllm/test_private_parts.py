"""The private interfaces of torch and transformers in use are listed, and fit the list."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import calibration
import morphoquant_vllm
from morphoquant_vllm import compat
from morphoquant_vllm.private_parts import PRIVATE_PARTS

PACKAGES = (morphoquant_vllm, calibration)
LIBRARIES = ("torch", "transformers")
# Documented attributes of NamedTuple.
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            yield str(path.relative_to(root.parent)), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_internal(path: str) -> bool:
    """Whether "module:name" is private, or stands in a module of transformers instead of transformers itself."""
    module, _, name = path.partition(":")
    return any(map(is_private, [*module.split("."), name])) or module.startswith("transformers.")


def internal_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            yield from (path for path in (f"{node.module}:{alias.name}" for alias in node.names) if is_internal(path))
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in LIBRARIES]
            yield from (path for path in (f"{name}:" for name in names) if is_internal(path))


def own_names() -> set[str]:
    """Private names that the packages define: functions, classes, variables, attributes that are assigned."""
    found = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_on_self(node):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def is_on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def read_names(tree: ast.Module) -> Iterator[str]:
    """Private names behind a dot, or in quotes after getattr and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            named = node.args[1]
            if isinstance(named, ast.Constant) and is_private(str(named.value)):
                yield str(named.value)


def modules() -> Iterator[object]:
    """The packages' modules that can be imported without Triton."""
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__") and not info.name.startswith("morphoquant_vllm.gpu."):
                yield importlib.import_module(info.name)


def overridden() -> Iterator[tuple[str, str]]:
    """(our class, "module:Class._method") of each private method of the libraries that one of our classes overrides."""
    for module in modules():
        for _, ours in inspect.getmembers(module, inspect.isclass):
            if ours.__module__ != module.__name__:
                continue
            methods = [name for name, member in vars(ours).items() if is_private(name) and inspect.isroutine(member)]
            for name in methods:
                owner = next((base for base in ours.__mro__[1:] if name in vars(base)), None)
                if owner is not None and owner.__module__.split(".")[0] in LIBRARIES:
                    yield ours.__name__, f"{owner.__name__}.{name}"


def listed_members() -> set[str]:
    """The last name of each entry."""
    return {path.replace(":", ".").rpartition(".")[2] for path in PRIVATE_PARTS}


def test_every_internal_import_is_listed() -> None:
    found = {path: file for file, tree in sources() for path in internal_imports(tree)}
    assert len(found) > 10
    assert {path: file for path, file in found.items() if path not in PRIVATE_PARTS} == {}


def test_every_private_name_that_is_not_ours_is_listed() -> None:
    known = own_names() | NAMED_TUPLE | listed_members()
    found = {name: file for file, tree in sources() for name in read_names(tree)}
    assert {"_int_mm", "_from_config"} <= found.keys()
    assert {name: file for name, file in found.items() if name not in known} == {}


def test_every_private_method_that_is_overridden_is_listed() -> None:
    found = list(overridden())
    assert len(found) > 2
    listed = {path.partition(":")[2] for path in PRIVATE_PARTS}
    assert [(ours, path) for ours, path in found if path not in listed] == []


def test_every_listed_part_is_used() -> None:
    text = "\n".join(ast.unparse(tree) for file, tree in sources() if not file.endswith("private_parts.py"))
    assert [name for name in listed_members() if name not in text] == []


def test_the_installed_libraries_have_them_as_listed() -> None:
    assert compat.differences(PRIVATE_PARTS) == []
