"""The list of used vLLM interfaces is complete and fits the installed vLLM, and a difference is named."""

import ast
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from morphoquant_vllm import compat

PACKAGE = Path(compat.__file__).parent
# The one room that imports vLLM (tests/test_architecture.py).
PLUGIN = sorted((PACKAGE / "plugin").glob("*.py"))


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def imported() -> Iterator[tuple[str, str]]:
    """(file, "module:name") of every import from vLLM in the package."""
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
                yield from ((file, f"{node.module}:{alias.name}") for alias in node.names)
            if isinstance(node, ast.Import):
                yield from ((file, f"{a.name}:") for a in node.names if a.name.split(".")[0] == "vllm")


def plugin_classes() -> list[type]:
    """Classes of the plugin that derive from one of vLLM's."""
    found = []
    for path in (path for path in PLUGIN if path.stem != "__init__"):
        module = importlib.import_module(f"morphoquant_vllm.plugin.{path.stem}")
        classes = [thing for _, thing in inspect.getmembers(module, inspect.isclass)]
        found += [cls for cls in classes if cls.__module__ == module.__name__]
    return [cls for cls in found if any(base.__module__.startswith("vllm.") for base in cls.__mro__)]


def overridden() -> Iterator[tuple[str, type, str]]:
    """("module:Class.method", our class, method) of each method of vLLM that a class of the plugin overrides."""
    for ours in plugin_classes():
        for method in vars(ours):
            owner = next((base for base in ours.__mro__[1:] if method in vars(base)), None)
            if owner and owner.__module__.startswith("vllm.") and inspect.isroutine(getattr(owner, method)):
                yield f"{owner.__module__}:{owner.__name__}.{method}", ours, method


def test_every_import_from_vllm_is_listed() -> None:
    found = {name: file for file, name in imported()}
    assert len(found) > 15
    assert {name: file for name, file in found.items() if name not in compat.INTERFACES} == {}


def test_every_listed_name_is_used() -> None:
    used = {name for _, name in imported()} | {name for name, _, _ in overridden()}
    text = "\n".join(path.read_text() for path in PLUGIN)
    unused = []
    for path in set(compat.INTERFACES) - used - {"vllm.plugins:DEFAULT_PLUGINS_GROUP"}:
        member = path.rpartition(".")[2]
        if member not in ("__new__", "__init__") and member not in text:
            unused.append(path)
    assert unused == []


def test_every_overridden_method_is_listed_and_takes_what_vllm_passes() -> None:
    found = list(overridden())
    assert len(found) > 12
    for path, ours, method in found:
        assert path in compat.INTERFACES
        taken = inspect.signature(getattr(ours, method)).parameters.values()
        module, _, name = path.partition(":")
        theirs = inspect.signature(getattr(getattr(importlib.import_module(module), name.split(".")[0]), method))
        if method in ("__init__", "__getstate__"):
            continue  # called by the plugin and by pickle, not by vLLM
        names = {parameter.name for parameter in taken}
        open_ended = any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in taken)
        assert open_ended or set(theirs.parameters) <= names, f"{ours.__name__}.{method} does not take all of {theirs}"


def test_no_class_of_the_plugin_leaves_a_method_abstract() -> None:
    assert len(plugin_classes()) == 13
    for ours in plugin_classes():
        assert not inspect.isabstract(ours), f"{ours.__name__}: {getattr(ours, '__abstractmethods__', None)}"


def test_the_installed_vllm_has_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    status = compat.main()
    count = len(compat.INTERFACES)
    printed = capsys.readouterr().out
    assert f"{count} of {count} interfaces are as the plugin uses them" in printed, printed
    assert status == 0


MODULE = """
class Base: ...
class Layer(Base):
    declared: int
    constant = 1
    def __init__(self, size, *, bias=True):
        self.set, self.both = 1, 2
    @property
    def computed(self): return 1
    @classmethod
    def make(cls, config: dict) -> "Layer": ...
def function(x: int, y: str = "a") -> None: ...
def with_function(x, y=function): ...
"""


@pytest.fixture
def other_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module vllm.other, from a file, since some attributes are seen in the source alone."""
    path = tmp_path / "other.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("vllm.other", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "vllm.other", module)
    return module


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("function", "(x, y='a')"),
        ("with_function", "(x, y=<function function>)"),
        ("Layer", "class(Base)"),
        ("Layer.__init__", "(self, size, *, bias=True)"),
        ("Layer.make", "(config)"),
        ("Layer.declared", "attribute"),
        ("Layer.constant", "attribute"),
        ("Layer.set", "attribute"),
        ("Layer.both", "attribute"),
        ("Layer.computed", "property"),
        ("Layer.gone", "missing"),
        ("gone", "missing"),
    ],
)
def test_interfaces_are_described(other_vllm: types.ModuleType, path: str, words: str) -> None:
    assert compat.describe(f"vllm.other:{path}") == words


def test_a_difference_is_named(other_vllm: types.ModuleType) -> None:
    expected = {"vllm.other:function": "(x)", "vllm.other:Layer": "class(Base)", "vllm.nowhere:name": "(x)"}
    first, second = compat.differences(expected)
    assert first == "vllm.other:function is (x, y='a'), not (x)"
    assert second.startswith("vllm.nowhere:name is missing (No module named 'vllm.nowhere'), not (x)")


def test_no_module_but_compat_asks_which_vllm_it_is() -> None:
    """A branch on the version would outlive the version that needs it: here it would have to carry its own test.

    As long as compat.py has no branch either, none can go stale; the last assertion is to be replaced by the tests of
    the first one that comes, each of which fails when pyproject.toml's oldest vLLM no longer needs it.
    """
    branches = []
    for file, tree in sources():
        # These look at an environment's distributions and serve nothing.
        if file.startswith("doctor/"):
            continue
        for node in ast.walk(tree):
            tried = isinstance(node, ast.Try) and any(
                isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("vllm")
                for part in node.body
                for inner in ast.walk(part)
            )
            asked = isinstance(node, ast.Attribute | ast.Name) and "vllm_version" in ast.unparse(node).lower()
            version = isinstance(node, ast.Call) and "version('vllm" in ast.unparse(node)
            if tried or asked or version:
                branches.append((file, ast.unparse(node)))
    # The command prints the version; it decides nothing by it.
    assert branches == [("compat.py", "importlib.metadata.version('vllm')")]
