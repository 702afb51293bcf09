"""Finds this project's files that decide the bytes of a checkpoint: calibration's imports, and the data beside them.

It reads the import statements instead of a list, so renamed and added files are included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# This module imports every module that a calibration runs, directly or indirectly.
ENTRY = "calibration.calibrate"
# Top-level packages of this project; other packages are identified by their version.
PACKAGES = ("calibration", "morphoquant_vllm")


def code_files(root: Path, entry: str = ENTRY) -> dict[str, Path]:
    """Files that `entry` imports, by their path below `root`, with the data files in the folders of their packages.

    `root` is the folder that holds PACKAGES. Imports inside functions and for type checking count too. Raises
    ModuleNotFoundError if an imported module of this project has no file.
    """
    modules = _imported_modules(root, entry)
    packages = {path.parent for path in modules.values()}
    data = [path for package in packages for path in _data_files(package)]
    return {str(path.relative_to(root)): path for path in sorted({*modules.values(), *data})}


def _imported_modules(root: Path, entry: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in files:
            continue
        path = _module_file(root, module)
        if path is None:
            raise ModuleNotFoundError(f"{module}: is imported by calibration, but has no file below {root}")
        files[module] = path
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        waiting += _imports_of(root, path, package)
        # Importing a module also runs its parent packages.
        waiting += [parent for parent in _parents(module) if parent not in files]
    return files


def _imports_of(root: Path, path: Path, package: str) -> Iterator[str]:
    """Modules of this project that the file imports; `package` is the package of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            if _is_ours(module):
                yield module
                names = (f"{module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if _module_file(root, name) is not None)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _module_file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _data_files(package: Path) -> Iterator[Path]:
    """Files other than Python in a package's folder and in its subfolders that are not packages: kernels, tables."""
    for path in package.iterdir():
        if path.is_dir():
            if path.name != "__pycache__" and not (path / "__init__.py").exists():
                yield from _data_files(path)
        elif path.suffix != ".py":
            yield path
